//! A conversation as token ids.
//!
//! It is one sequence where the chat template writes each assistant's turn in the same way whether
//! or not more messages follow. Some templates do not: those of reasoning models drop the thoughts
//! of earlier turns. Such a conversation becomes one sequence for each assistant's turn, which ends
//! with that turn: what the model sees when it writes the turn, and what it should write then.
//! An answer is learned in its own sequence only, and what stands in more than one sequence as a
//! prompt counts once.

use super::fault::Fault;
use super::message::{Message, Role};
use super::protect::{BLANK, BLANK_THOUGHTS};
use super::tokenize::{TokenizeOptions, Tokens, Weight, from_tokenizer};
use super::tokenizer::{ChatTokenizer, Conversation, Encoded};
use serde_json::Value;
use std::borrow::Cow;
use std::ops::Range;

/// A conversation whose every assistant's turn is learned, as one sequence, or where that cannot
/// be, as one for each of these turns.
pub(super) fn chat(
    tokenizer: &ChatTokenizer,
    messages: &[Message],
    tools: Option<&Value>,
    options: &TokenizeOptions,
) -> Result<Vec<Tokens>, Fault> {
    let chat = Chat::new(tokenizer, messages, tools, options)?;
    match chat.at_once(0)? {
        Some(tokens) => Ok(vec![tokens]),
        None => chat.turn_by_turn(),
    }
}

/// A conversation of which the last turn alone is learned.
pub(super) fn last_turn(
    tokenizer: &ChatTokenizer,
    messages: &[Message],
    tools: Option<&Value>,
    options: &TokenizeOptions,
) -> Result<Tokens, Fault> {
    let last = messages.len() - 1;
    let chat = Chat::new(tokenizer, messages, tools, options)?;
    chat.at_once(last)?.ok_or_else(|| not_where_it_is_asked_for(last))
}

struct Chat<'a> {
    tokenizer: &'a ChatTokenizer,
    conversation: Conversation<'a>,
    messages: &'a [Message],
    options: &'a TokenizeOptions,
}

impl<'a> Chat<'a> {
    fn new(
        tokenizer: &'a ChatTokenizer,
        messages: &'a [Message],
        tools: Option<&Value>,
        options: &'a TokenizeOptions,
    ) -> Result<Self, Fault> {
        let conversation =
            tokenizer.conversation(messages, tools).map_err(|error| from_tokenizer(&error))?;
        let mentions = |name: &str| conversation.template_mentions(name);
        if let Some(index) = messages.iter().position(Message::has_tool_calls)
            && !mentions("tool_calls")
        {
            return Err(no_place_for(&format!("messages[{index}].tool_calls")));
        }
        if tools.is_some() && !mentions("tools") {
            return Err(no_place_for("tools"));
        }
        let has_thoughts = |message: &Message| message.thoughts().is_some_and(|text| text != "");
        if let Some(index) = messages.iter().position(has_thoughts)
            && !(mentions("reasoning") || mentions("thinking"))
        {
            return Err(Fault::new(
                format!(
                    "messages[{index}] has thoughts beside its content, but the model's chat \
                     template has no place for them."
                ),
                "Write them into the content, choose a model that was made to think, or leave \
                 them out.",
            ));
        }
        Ok(Self { tokenizer, conversation, messages, options })
    }

    /// The conversation, rendered once, in which the assistant's turns from message `first` on are
    /// learned. Where one lies is found by rendering the messages before it, and those up to it.
    /// None when a turn is written in another way once more messages follow.
    fn at_once(&self, first: usize) -> Result<Option<Tokens>, Fault> {
        let whole = self.render(self.messages.len(), false)?;
        let Encoded { ids, offsets } = self.encode(&whole)?;
        // Turns past the cut are not looked for, so a row of any length renders no more prefixes
        // than its kept tokens can have turns.
        let cut = match offsets.get(self.options.max_seq_length) {
            Some(&(start, _)) => start,
            None => whole.len(),
        };
        let mut weights = vec![Weight::Prompt; ids.len()];
        for (index, message) in self.answers().skip_while(|&(index, _)| index < first) {
            let before = self.render(index, true)?;
            if !whole.starts_with(&before) {
                return Ok(None);
            }
            if before.len() >= cut {
                break;
            }
            let up_to = match index + 1 == self.messages.len() {
                true => Cow::Borrowed(&whole),
                false => Cow::Owned(self.render(index + 1, false)?),
            };
            let goes_on = whole.starts_with(up_to.as_str());
            let end = if goes_on { up_to.len() } else { common_prefix(&whole, &up_to) };
            // Templates may write an end of all behind the last turn, where the next message comes
            // instead when there is one. What counts is the turn up to the token that ends it.
            let turn = self.turn(&ids, &offsets, before.len()..end);
            if !goes_on && !turn.ends_with_a_stop {
                return Ok(None);
            }
            weights[turn.tokens].fill(Weight::Completion(message.weight));
        }
        Ok(Some(Tokens { ids, weights }))
    }

    /// For each assistant's turn that is to be learned, the conversation up to the token that ends
    /// it. The turns before it are context there, as the model sees them when it writes this one.
    ///
    /// Turns after one that lies past the cut are left out, so that a row of any length renders no
    /// more prefixes than its kept tokens can have turns.
    fn turn_by_turn(&self) -> Result<Vec<Tokens>, Fault> {
        let (mut sequences, mut learned) = (Vec::new(), Vec::new());
        for (index, message) in self.answers().filter(|(_, message)| message.weight > 0.0) {
            let before = self.render(index, true)?;
            let text = self.render(index + 1, false)?;
            if !text.starts_with(&before) {
                return Err(not_where_it_is_asked_for(index));
            }
            let Encoded { mut ids, offsets } = self.encode(&text)?;
            let turn = self.turn(&ids, &offsets, before.len()..text.len()).tokens;
            // Where prompts count for nothing, what of the rest is prompt makes no difference.
            let mut weights = vec![Weight::Prompt; turn.end];
            if self.options.prompt_loss_weight > 0.0 {
                for (number, bytes) in self.earlier_answers(index, &text)? {
                    let Range { start, mut end } = self.inside(&offsets, bytes);
                    end += usize::from(ids.get(end).is_some_and(|&id| self.ends_a_turn(id)));
                    // The sequence of that answer has counted what stands before it.
                    let start = if learned.contains(&number) { 0 } else { start };
                    if let Some(answer) = weights.get_mut(start..end.min(turn.end)) {
                        answer.fill(Weight::Counted);
                    }
                }
            }
            weights[turn.clone()].fill(Weight::Completion(message.weight));
            ids.truncate(turn.end);
            sequences.push(Tokens { ids, weights });
            learned.push(index);
            if turn.start >= self.options.max_seq_length {
                break;
            }
        }
        Ok(sequences)
    }

    /// The assistant's messages.
    fn answers(&self) -> impl Iterator<Item = (usize, &Message)> {
        self.messages.iter().enumerate().filter(|(_, message)| message.role == Role::Assistant)
    }

    fn render(&self, count: usize, add_generation_prompt: bool) -> Result<String, Fault> {
        self.conversation
            .render(count, add_generation_prompt)
            .map_err(|error| from_tokenizer(&error))
    }

    fn encode(&self, text: &str) -> Result<Encoded, Fault> {
        self.tokenizer.encode_marked(text).map_err(|error| from_tokenizer(&error))
    }

    /// The numbers of the assistant's messages before `index`, and where in `text`, the conversation
    /// up to that one, their words lie, without the tokens that end the turns: what differs from
    /// the same text with blanks in their place.
    fn earlier_answers(
        &self,
        index: usize,
        text: &str,
    ) -> Result<Vec<(usize, Range<usize>)>, Fault> {
        let earlier: Vec<usize> =
            self.answers().map(|(number, _)| number).take_while(|&number| number < index).collect();
        if earlier.is_empty() {
            return Ok(Vec::new());
        }
        let find = |with_thoughts| {
            let blanked = self.conversation.render_with_blanks(index + 1, &earlier, with_thoughts);
            let found = filled_in(&blanked.ok()?, text);
            found.filter(|answers| answers.len() == earlier.len())
        };
        // Templates that keep thoughts since the last question may write them where there are none.
        let found = find(false).or_else(|| find(true)).ok_or_else(|| {
            Fault::new(
                format!(
                    "the model's chat template writes the answers before messages[{index}] in \
                     another way once more messages follow, so that prompts and answers cannot be \
                     told apart there, and prompt_loss_weight counts prompts."
                ),
                "Set prompt_loss_weight to 0, or write one row for each answer, ending with it.",
            )
        })?;
        Ok(earlier.into_iter().zip(found).collect())
    }

    /// Whether it is a token that templates end turns with.
    fn ends_a_turn(&self, id: u32) -> bool {
        self.tokenizer.is_special(id) || self.tokenizer.eos_ids().contains(&id)
    }

    /// The tokens that lie in `bytes` of the text.
    fn inside(&self, offsets: &[(usize, usize)], bytes: Range<usize>) -> Range<usize> {
        let from = offsets.partition_point(|&(start, _)| start < bytes.start);
        from..from + offsets[from..].partition_point(|&(_, end)| end <= bytes.end)
    }

    /// The tokens of a turn, which lies in `bytes` of the text, up to the one that ends it: the
    /// first at which generation stops, or else the last special one. What a template writes after
    /// that is never generated.
    fn turn(&self, ids: &[u32], offsets: &[(usize, usize)], bytes: Range<usize>) -> Turn {
        let Range { start, end } = self.inside(offsets, bytes);
        let turn = &ids[start..end];
        let stop = turn.iter().position(|id| self.tokenizer.eos_ids().contains(id));
        let last_special = || turn.iter().rposition(|&id| self.tokenizer.is_special(id));
        let length = stop.or_else(last_special).map_or(turn.len(), |last| last + 1);
        Turn { tokens: start..start + length, ends_with_a_stop: stop.is_some() }
    }
}

/// What is learned of an assistant's turn.
struct Turn {
    tokens: Range<usize>,
    ends_with_a_stop: bool,
}

/// Bytes, in whole characters, that two texts have in common at their start.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    a.floor_char_boundary(same)
}

/// What stands in `text` in the place of each blank of `blanked`, a blank for thoughts and the next
/// as one; None where the two differ in more than that.
fn filled_in(blanked: &str, text: &str) -> Option<Vec<Range<usize>>> {
    let after_thoughts = &BLANK_THOUGHTS[BLANK.len()..];
    let (rest, last) = blanked.rsplit_once(BLANK)?;
    let end = text.strip_suffix(last.strip_prefix(after_thoughts).unwrap_or(last))?.len();
    let mut pieces = rest.split(BLANK);
    let first = pieces.next()?;
    let mut at = text[..end].starts_with(first).then_some(first.len())?;
    let mut start = at;
    let mut found = Vec::new();
    for piece in pieces {
        let (goes_on, piece) = match piece.strip_prefix(after_thoughts) {
            Some(piece) => (true, piece),
            None => (false, piece),
        };
        at += text[at..end].find(piece)?;
        if !goes_on {
            found.push(start..at);
            start = at + piece.len();
        }
        at += piece.len();
    }
    found.push(start..end);
    Some(found)
}

fn no_place_for(path: &str) -> Fault {
    Fault::at_key(
        path,
        "is given, but the model's chat template has no place for it.",
        "Choose a model that was made for tools, or leave it out.",
    )
}

fn not_where_it_is_asked_for(index: usize) -> Fault {
    Fault::at_key(
        format_args!("messages[{index}]"),
        "does not begin, in the text of the model's chat template, where the template asks the \
         model to write it, so its tokens cannot be told from the rest.",
        "Choose a model whose chat template writes an answer where it asks for it.",
    )
}

#[cfg(test)]
mod tests {
    use super::super::row::{Example, Row};
    use super::super::testing::{byte_tokenizer, chatml};
    use super::super::tokenize::{TokenizedRow, tokenize_row};
    use super::*;
    use crate::errors::ApiError;
    use serde_json::json;

    const OPTIONS: TokenizeOptions =
        TokenizeOptions { max_seq_length: 1000, prompt_loss_weight: 0.1 };

    /// As templates of reasoning models: thoughts are kept in answers to the last question only,
    /// and the last answer has them even when they are empty.
    const REASONING: &str = "{%- set ns = namespace(last=-1) -%}\
        {%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}\
        {%- for m in messages -%}\
        {%- set content = m.content -%}{%- set thoughts = '' -%}\
        {%- if '</think>' in content -%}\
        {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}\
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}\
        {%- endif -%}\
        {{- '<|im_start|>' + m.role + '\\n' -}}\
        {%- if m.role == 'assistant' and loop.index0 > ns.last -%}\
        {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' -}}{%- endif -%}\
        {{- content + '<|im_end|>\\n' -}}\
        {%- endfor -%}\
        {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

    fn user(text: &str) -> Message {
        Message::new(Role::User, text)
    }

    fn assistant(text: &str) -> Message {
        Message::new(Role::Assistant, text)
    }

    fn with_template(template: &str) -> ChatTokenizer {
        byte_tokenizer(&json!({}), &json!({"chat_template": template}))
    }

    fn tokenized(
        template: &str,
        messages: Vec<Message>,
        options: &TokenizeOptions,
    ) -> Result<TokenizedRow, ApiError> {
        let row = Row { line: 7, example: Example::Chat { messages, tools: None } };
        tokenize_row(&with_template(template), &row, options, "training_file")
    }

    /// The text of sequence `number`, or of its tokens whose weight is `weight`.
    fn text_of(row: &TokenizedRow, number: usize, weight: Option<f32>) -> String {
        let range = row.sequences().nth(number).expect("sequence");
        let all = row.ids[range.clone()].iter().zip(&row.weights[range]);
        let wanted = all.filter(|(_, found)| weight.is_none_or(|weight| **found == weight));
        let ids: Vec<u32> = wanted.map(|(&id, _)| id).collect();
        chatml().decode_with_special(&ids).expect("decode")
    }

    #[test]
    fn a_template_that_drops_earlier_thoughts_gets_one_sequence_for_each_turn() {
        let messages = vec![
            user("a"),
            assistant("<think>\nA\n</think>\n\nb"),
            user("c"),
            assistant("d"),
            user("e"),
            assistant("<think>\nE\n</think>\n\nf"),
        ];
        let row = tokenized(REASONING, messages, &OPTIONS).expect("tokens");
        assert_eq!(row.starts.len(), 3);
        assert_eq!(row.sequences().last().map(|range| range.end), Some(row.ids.len()));
        let question =
            |text: &str| format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
        // What each learns, the text before that, and what of it counts as a prompt there for the
        // first time; the first token of a sequence counts for nothing.
        let expected = [
            ("<think>\nA\n</think>\n\nb<|im_end|>", question("a"), &question("a")[12..]),
            (
                "<think>\n\n</think>\n\nd<|im_end|>",
                format!("{}b<|im_end|>\n{}", question("a"), question("c")),
                &format!("\n{}", question("c")),
            ),
            (
                "<think>\nE\n</think>\n\nf<|im_end|>",
                format!(
                    "{}b<|im_end|>\n{}d<|im_end|>\n{}",
                    question("a"),
                    question("c"),
                    question("e")
                ),
                &format!("\n{}", question("e")),
            ),
        ];
        for (number, (learned, before, prompt)) in expected.into_iter().enumerate() {
            assert_eq!(text_of(&row, number, None), format!("{before}{learned}"), "{number}");
            assert_eq!(text_of(&row, number, Some(1.0)), learned, "{number}");
            assert_eq!(text_of(&row, number, Some(0.1)), prompt, "{number}");
        }
        assert!(row.starts.iter().all(|&start| row.weights[start] == 0.0));
    }

    #[test]
    fn turn_by_turn_counts_what_at_once_counts() {
        let tokenizer = chatml();
        let half = Message { weight: 0.5, ..assistant("b<|im_end|>") };
        let none = Message { weight: 0.0, ..assistant("nothing") };
        let messages = [user("a"), half, user("c"), none, user("d"), assistant(""), assistant("e")];
        let chat = Chat::new(&tokenizer, &messages, None, &OPTIONS).expect("conversation");
        let whole = chat.at_once(0).expect("tokens").expect("one way of writing");
        let parts = chat.turn_by_turn().expect("tokens");
        assert_eq!(parts.len(), 3);
        let count = |weights: &mut dyn Iterator<Item = &Weight>, wanted: Weight| {
            weights.filter(|weight| **weight == wanted).count()
        };
        for weight in [0.5, 1.0].map(Weight::Completion) {
            assert_eq!(
                count(&mut parts.iter().flat_map(|part| &part.weights), weight),
                count(&mut whole.weights.iter(), weight),
            );
        }
        // A sequence ends with its turn, so the newline after the last one is in none.
        assert_eq!(
            count(&mut parts.iter().flat_map(|part| &part.weights), Weight::Prompt),
            count(&mut whole.weights.iter(), Weight::Prompt) - 1,
        );
        let last = parts.last().expect("three");
        assert_eq!(last.ids, whole.ids[..whole.ids.len() - 1]);
    }

    #[test]
    fn turn_by_turn_leaves_out_what_has_no_weight_or_is_cut_away() {
        let silent = Message { weight: 0.0, ..assistant("b") };
        let messages = vec![user("a"), silent, user("c"), assistant("d")];
        let row = tokenized(REASONING, messages, &OPTIONS).expect("tokens");
        assert_eq!(row.starts, [0]);
        assert_eq!(text_of(&row, 0, Some(1.0)), "<think>\n\n</think>\n\nd<|im_end|>");
        assert_eq!(text_of(&row, 0, Some(0.0)), "<|im_start|>b<|im_end|>", "and the first token");
        assert!(!row.truncated);

        let long = "x".repeat(100);
        let messages =
            vec![user("a"), assistant("b"), user(&long), assistant("d"), user("e"), assistant("f")];
        let options = TokenizeOptions { max_seq_length: 60, ..OPTIONS };
        let row = tokenized(REASONING, messages, &options).expect("tokens");
        assert_eq!(row.starts, [0]);
        assert!(row.truncated);
        assert_eq!(text_of(&row, 0, Some(1.0)), "<think>\n\n</think>\n\nb<|im_end|>");
    }

    #[test]
    fn an_end_of_text_behind_the_last_turn_does_not_make_the_turns_differ() {
        // As Phi-3's: the end of the text stands where the next question would.
        let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + \
                        '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}\
                        {{ '<|im_start|>assistant\\n' }}{% else %}{{ '<s>' }}{% endif %}";
        let messages = vec![user("a"), assistant("b"), user("c"), assistant("d")];
        let row = tokenized(template, messages, &OPTIONS).expect("tokens");
        assert_eq!(row.starts, [0]);
        // Nothing is generated behind the token at which generation stops.
        assert_eq!(text_of(&row, 0, Some(1.0)), "b<|im_end|>d<|im_end|>");
        assert!(text_of(&row, 0, Some(0.1)).ends_with("assistant\n\n<s>"));
    }

    #[test]
    fn prompts_that_cannot_be_told_from_answers_are_refused_unless_they_count_for_nothing() {
        // Earlier answers begin with their length, which a blank's is not.
        let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}\
                        {% if m.role == 'assistant' and not loop.last %}\
                        {{ m.content | length }}{% endif %}\
                        {{ m.content + '<|im_end|>' }}{% endfor %}\
                        {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
        let messages = vec![user("a"), assistant("b"), user("c"), assistant("d")];
        let error = tokenized(template, messages.clone(), &OPTIONS).expect_err("no places");
        let start = "Line 7: the model's chat template writes the answers before messages[3] in";
        assert!(error.message.starts_with(start), "{error}");
        assert!(error.message.contains("Set prompt_loss_weight to 0"), "{error}");
        let options = TokenizeOptions { prompt_loss_weight: 0.0, ..OPTIONS };
        let row = tokenized(template, messages, &options).expect("tokens");
        assert_eq!(row.starts.len(), 2);
        assert_eq!(text_of(&row, 1, Some(1.0)), "d<|im_end|>");
    }

    #[test]
    fn thoughts_since_the_last_question_are_no_prompt_where_they_are_kept() {
        // Thoughts are written since the last question, even empty ones.
        let template = "{%- set ns = namespace(last=-1) -%}\
            {%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}\
            {%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}\
            {%- if m.role == 'assistant' and loop.index0 > ns.last -%}\
            {{- '<think>' + (m.thinking or '') + '</think>' -}}{%- endif -%}\
            {{- m.content + '<|im_end|>' -}}{%- endfor -%}\
            {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>' -}}{%- endif -%}";
        let thought = |text: &str| {
            let mut message = assistant("b");
            message.rest.insert("reasoning".to_owned(), text.into());
            message
        };
        let tool = Message::new(Role::Tool, "t");
        let messages = vec![user("a"), thought("A"), tool, thought("T"), user("c"), assistant("d")];
        let row = tokenized(template, messages, &OPTIONS).expect("tokens");
        let expected = [
            ("A</think>b<|im_end|>", "user\na<|im_end|><|im_start|>assistant\n<think>"),
            ("T</think>b<|im_end|>", "<|im_start|>tool\nt<|im_end|><|im_start|>assistant\n<think>"),
            ("</think>d<|im_end|>", "<|im_start|>user\nc<|im_end|><|im_start|>assistant\n<think>"),
        ];
        for (number, (learned, prompt)) in expected.into_iter().enumerate() {
            assert_eq!(text_of(&row, number, Some(1.0)), learned, "{number}");
            assert_eq!(text_of(&row, number, Some(0.1)), prompt, "{number}");
        }
    }

    #[test]
    fn thoughts_that_a_template_would_drop_from_every_turn_are_refused() {
        let mut message = assistant("b");
        message.rest.insert("reasoning_content".to_owned(), "A".into());
        let template = super::super::testing::CHATML;
        let error = tokenized(template, vec![user("a"), message], &OPTIONS).expect_err("no place");
        assert!(error.message.starts_with("Line 7: messages[1] has thoughts beside"), "{error}");
    }

    #[test]
    fn a_template_that_asks_in_another_way_than_it_writes_is_refused() {
        let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + \
                        '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}";
        let error = tokenized(template, vec![user("a"), assistant("b")], &OPTIONS)
            .expect_err("it asks for the answer elsewhere");
        assert!(error.message.starts_with("Line 7: messages[1] does not begin"), "{error}");
        assert!(error.message.ends_with("writes an answer where it asks for it."), "{error}");
    }

    #[test]
    fn blanks_are_found_in_order_and_only_where_the_rest_is_the_same() {
        let blanked = format!("a{BLANK}b{BLANK}c");
        assert_eq!(filled_in(&blanked, "a12b3c"), Some(vec![1..3, 4..5]));
        assert_eq!(filled_in(&blanked, "abc"), Some(vec![1..1, 2..2]));
        for text in ["x12b3c", "a12b3", "a123c", "ac"] {
            assert_eq!(filled_in(&blanked, text), None, "{text}");
        }
        let thoughtful = format!("a{BLANK_THOUGHTS}b{BLANK}c{BLANK}d");
        assert_eq!(filled_in(&thoughtful, "a1b2c3d"), Some(vec![1..4, 5..6]));
    }
}
