//! Rows of two answers to one prompt, for learning from preferences: OpenAI's shape, and the one
//! with `chosen` and `rejected` that TRL reads.

use super::fault::{Fault, quoted, shortened};
use super::format::{Repair, Shape};
use super::message::{Message, Role, parse_message};
use super::row::{Example, filled_text, text, tools};
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// The keys by which a row shows that it is a pair.
pub(super) const PAIR_KEYS: [&str; 4] =
    ["preferred_output", "non_preferred_output", "chosen", "rejected"];

const SHAPE_HINT: &str = "Write {\"input\": {\"messages\": […]}, \"preferred_output\": [{\"role\": \
                          \"assistant\", \"content\": …}], \"non_preferred_output\": […]}.";

/// Reads and checks the object of one row of pairs.
pub(super) fn parse_pair(
    fields: &Map<String, Value>,
    repairs: &mut BTreeSet<Repair>,
) -> Result<(Shape, Example), Fault> {
    let has = |key: &str| fields.contains_key(key);
    if has("preferred_output") || has("non_preferred_output") {
        return Ok((Shape::Preference, openai(fields, repairs)?));
    }
    if !has("chosen") && !has("rejected") {
        return Err(no_pair(fields));
    }
    match (fields.get("chosen"), fields.get("rejected")) {
        (Some(Value::Array(_)), _) | (_, Some(Value::Array(_))) => {
            Ok((Shape::ChosenRejected, trl_messages(fields, repairs)?))
        }
        _ => {
            let part = |key| filled_text(fields, key).map(str::to_owned);
            let example = Example::TextPair {
                prompt: text(fields, "prompt")?.to_owned(),
                chosen: part("chosen")?,
                rejected: part("rejected")?,
            };
            Ok((Shape::ChosenRejectedText, example))
        }
    }
}

/// The fault of a row of another shape, named by the shape that it seems to have.
fn no_pair(fields: &Map<String, Value>) -> Fault {
    const KINDS: [(&str, &str); 6] = [
        ("messages", "a chat row"),
        ("conversations", "a sharegpt row"),
        ("completion", "a prompt/completion row"),
        ("instruction", "an alpaca row"),
        ("text", "a text row"),
        ("prompt", "a prompt without answers"),
    ];
    let kind = KINDS.into_iter().find(|(key, _)| fields.contains_key(*key));
    let rule = match kind {
        Some((_, kind)) => format!("the row is {kind}"),
        None => {
            let keys: Vec<_> = fields.keys().map(|key| format!("\"{key}\"")).collect();
            format!("the row has the keys {}", shortened(&keys.join(", ")))
        }
    };
    Fault::new(
        format!("{rule}, but method \"dpo\" takes preference pairs."),
        format!("{SHAPE_HINT} Examples without a pair belong to method \"supervised\"."),
    )
}

/// `{"input": {"messages", "tools"}, "preferred_output": […], "non_preferred_output": […]}`.
fn openai(fields: &Map<String, Value>, repairs: &mut BTreeSet<Repair>) -> Result<Example, Fault> {
    let input = match fields.get("input") {
        Some(Value::Object(input)) => input,
        Some(other) => {
            return Err(Fault::at_key(
                "input",
                format!("is {}, but must be an object.", quoted(other)),
                SHAPE_HINT,
            ));
        }
        None => {
            return Err(Fault::at_key("input", "is missing, but must be an object.", SHAPE_HINT));
        }
    };
    let messages = messages(input.get("messages"), "input.messages", repairs)?;
    check_prompt(&messages, "input.messages")?;
    let mut answer = |key: &str| only_answer(messages_of(fields, key, repairs)?, key);
    let (chosen, rejected) = (answer("preferred_output")?, answer("non_preferred_output")?);
    pair(messages, tools(input)?, chosen, rejected, repairs)
}

/// `{"prompt": […], "chosen": […], "rejected": […]}`. Without a prompt, or with one that merely
/// repeats its first question, the messages that both lists begin with are the prompt.
fn trl_messages(
    fields: &Map<String, Value>,
    repairs: &mut BTreeSet<Repair>,
) -> Result<Example, Fault> {
    let mut chosen = messages_of(fields, "chosen", repairs)?;
    let mut rejected = messages_of(fields, "rejected", repairs)?;
    let mut prompt = match fields.get("prompt") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(question)) if begins_with(&chosen, question) => Vec::new(),
        Some(Value::String(question)) => vec![Message::new(Role::User, question)],
        prompt => messages(prompt, "prompt", repairs)?,
    };
    let most = chosen.len().min(rejected.len()).saturating_sub(1);
    let shared = chosen.iter().zip(&rejected).take(most).take_while(|(a, b)| a == b).count();
    prompt.extend(chosen.drain(..shared));
    rejected.drain(..shared);
    check_prompt(&prompt, "prompt")?;
    let (chosen, rejected) = (only_answer(chosen, "chosen")?, only_answer(rejected, "rejected")?);
    pair(prompt, tools(fields)?, chosen, rejected, repairs)
}

fn begins_with(messages: &[Message], question: &str) -> bool {
    let asked = messages.iter().find(|message| message.role == Role::User);
    asked.is_some_and(|message| message.content.as_deref() == Some(question))
}

fn messages_of(
    fields: &Map<String, Value>,
    key: &str,
    repairs: &mut BTreeSet<Repair>,
) -> Result<Vec<Message>, Fault> {
    messages(fields.get(key), key, repairs)
}

/// A list of messages, in which no weight counts.
fn messages(
    value: Option<&Value>,
    path: &str,
    repairs: &mut BTreeSet<Repair>,
) -> Result<Vec<Message>, Fault> {
    let Some(Value::Array(list)) = value else {
        let found = value.map_or("missing".to_owned(), quoted);
        return Err(Fault::at_key(
            path,
            format!("is {found}, but must be a list of messages."),
            "Write [{\"role\": …, \"content\": …}].",
        ));
    };
    let mut messages = Vec::with_capacity(list.len());
    for (index, value) in list.iter().enumerate() {
        let mut message = parse_message(value, &format!("{path}[{index}]"), repairs)?;
        if message.weight != 1.0 {
            repairs.insert(Repair::PairWeight);
            message.weight = 1.0;
        }
        messages.push(message);
    }
    Ok(messages)
}

/// Refuses a prompt to which no answer of the assistant's can follow.
fn check_prompt(messages: &[Message], path: &str) -> Result<(), Fault> {
    match messages.last() {
        None => Err(Fault::at_key(
            path,
            "has no message, but must hold what the two answers answer.",
            "Put the conversation before the answers there.",
        )),
        Some(last) if last.role == Role::Assistant => Err(Fault::at_key(
            path,
            "ends with a message of role \"assistant\", but the two answers are what \
                 the assistant says next.",
            "End it with the user's or the tool's message.",
        )),
        Some(_) => Ok(()),
    }
}

/// The one message of an answer.
fn only_answer(mut messages: Vec<Message>, path: &str) -> Result<Message, Fault> {
    let hint = "Write [{\"role\": \"assistant\", \"content\": …}], and what both answers have \
                before it into the prompt.";
    match (messages.pop(), messages.len()) {
        (Some(answer), 0) if answer.role == Role::Assistant => Ok(answer),
        (Some(answer), 0) => Err(Fault::at_key(
            path,
            format!("has a message of role \"{}\", but must have the assistant's.", answer.role),
            hint,
        )),
        (None, _) => {
            Err(Fault::at_key(path, "has no message, but must have one of the assistant's.", hint))
        }
        (Some(_), before) => Err(Fault::at_key(
            path,
            format!("has {} messages, but must have one.", before + 1),
            hint,
        )),
    }
}

fn pair(
    messages: Vec<Message>,
    tools: Option<Value>,
    chosen: Message,
    rejected: Message,
    repairs: &mut BTreeSet<Repair>,
) -> Result<Example, Fault> {
    if chosen == rejected {
        repairs.insert(Repair::EqualAnswers);
    }
    Ok(Example::ChatPair { messages, tools, chosen, rejected })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: &Value) -> (Result<(Shape, Example), Fault>, BTreeSet<Repair>) {
        let mut repairs = BTreeSet::new();
        (parse_pair(value.as_object().expect("object"), &mut repairs), repairs)
    }

    fn refusal(value: &Value) -> String {
        read(value).0.expect_err(&value.to_string()).into_api_error(3, "training_file").message
    }

    fn user(text: &str) -> Value {
        json!({"role": "user", "content": text})
    }

    fn assistant(text: &str) -> Value {
        json!({"role": "assistant", "content": text})
    }

    #[test]
    fn openais_rows_are_read_with_their_tools() {
        let tool = json!({"type": "function", "function": {"name": "f"}});
        let (read, repairs) = read(&json!({
            "input": {"messages": [user("q")], "tools": [tool], "parallel_tool_calls": true},
            "preferred_output": [assistant("a")],
            "non_preferred_output": [assistant("b")],
        }));
        let example = Example::ChatPair {
            messages: vec![Message::new(Role::User, "q")],
            tools: Some(json!([tool])),
            chosen: Message::new(Role::Assistant, "a"),
            rejected: Message::new(Role::Assistant, "b"),
        };
        assert_eq!(read, Ok((Shape::Preference, example)));
        assert!(repairs.is_empty());
    }

    #[test]
    fn chosen_and_rejected_are_read_with_a_prompt_and_without() {
        let example = Example::ChatPair {
            messages: vec![Message::new(Role::System, "s"), Message::new(Role::User, "q")],
            tools: None,
            chosen: Message::new(Role::Assistant, "a"),
            rejected: Message::new(Role::Assistant, "b"),
        };
        let system = json!({"role": "system", "content": "s"});
        for row in [
            json!({"prompt": [system, user("q")], "chosen": [assistant("a")],
                   "rejected": [assistant("b")]}),
            json!({"chosen": [system, user("q"), assistant("a")],
                   "rejected": [system, user("q"), assistant("b")]}),
            // As UltraFeedback has it: the prompt is there, and once more in both lists.
            json!({"prompt": "q", "chosen": [system, user("q"), assistant("a")],
                   "rejected": [system, user("q"), assistant("b")], "score_chosen": 8}),
        ] {
            assert_eq!(read(&row).0, Ok((Shape::ChosenRejected, example.clone())), "{row}");
        }
        let (read, _) = read(&json!({"prompt": "q", "chosen": [assistant("a")],
                                     "rejected": [assistant("b")]}));
        let Ok((_, Example::ChatPair { messages, .. })) = read else { panic!("{read:?}") };
        assert_eq!(messages, [Message::new(Role::User, "q")]);
    }

    #[test]
    fn texts_are_read_as_texts() {
        let row = json!({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"});
        let example = Example::TextPair {
            prompt: "1 + 1 =".to_owned(),
            chosen: " 2".to_owned(),
            rejected: " 3".to_owned(),
        };
        assert_eq!(read(&row).0, Ok((Shape::ChosenRejectedText, example)));
    }

    #[test]
    fn a_row_of_another_shape_is_refused_naming_the_method_it_belongs_to() {
        for (row, kind) in [
            (json!({"messages": [user("q"), assistant("a")]}), "a chat row"),
            (json!({"prompt": "q", "completion": "a"}), "a prompt/completion row"),
            (json!({"text": "t"}), "a text row"),
            (json!({"conversations": []}), "a sharegpt row"),
            (json!({"instruction": "i", "output": "o"}), "an alpaca row"),
        ] {
            let text = refusal(&row);
            let start = format!("Line 3: the row is {kind}, but method \"dpo\" takes preference");
            assert!(text.starts_with(&start), "{text}");
            assert!(text.ends_with("belong to method \"supervised\"."), "{text}");
        }
        let text = refusal(&json!({"question": "q"}));
        assert!(text.starts_with("Line 3: the row has the keys \"question\""), "{text}");
    }

    #[test]
    fn each_broken_rule_names_its_key_path() {
        let row = |input: Value, preferred: Value, other: Value| json!({"input": input, "preferred_output": preferred, "non_preferred_output": other});
        let input = json!({"messages": [user("q")]});
        let answer = json!([assistant("a")]);
        for (row, rule) in [
            (json!({"preferred_output": answer}), "input is missing"),
            (row(json!("q"), answer.clone(), answer.clone()), "input is \"q\""),
            (row(json!({}), answer.clone(), answer.clone()), "input.messages is missing"),
            (
                row(json!({"messages": []}), answer.clone(), answer.clone()),
                "input.messages has no message",
            ),
            (
                row(
                    json!({"messages": [user("q"), assistant("a")]}),
                    answer.clone(),
                    answer.clone(),
                ),
                "input.messages ends with a message of role \"assistant\"",
            ),
            (
                row(
                    json!({"messages": [{"role": "robot", "content": "q"}]}),
                    answer.clone(),
                    answer.clone(),
                ),
                "input.messages[0].role is \"robot\"",
            ),
            (
                row(json!({"messages": [user("q")], "tools": 5}), answer.clone(), answer.clone()),
                "tools is 5",
            ),
            (row(input.clone(), json!("a"), answer.clone()), "preferred_output is \"a\""),
            (row(input.clone(), json!([]), answer.clone()), "preferred_output has no message"),
            (
                row(input.clone(), json!([assistant("a"), assistant("b")]), answer.clone()),
                "preferred_output has 2 messages",
            ),
            (
                row(input.clone(), answer.clone(), json!([user("a")])),
                "non_preferred_output has a message of role \"user\"",
            ),
            (
                json!({"input": input, "preferred_output": answer}),
                "non_preferred_output is missing",
            ),
            (json!({"prompt": "q", "chosen": "a"}), "rejected is missing"),
            (json!({"chosen": "a", "rejected": "b"}), "prompt is missing"),
            (json!({"prompt": "q", "chosen": "", "rejected": "b"}), "chosen is empty"),
            (json!({"prompt": "q", "chosen": answer, "rejected": "b"}), "rejected is \"b\""),
            (json!({"chosen": answer, "rejected": answer}), "prompt has no message"),
            (
                json!({"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}),
                "prompt has no message",
            ),
        ] {
            let text = refusal(&row);
            assert!(text.starts_with(&format!("Line 3: {rule}")), "{text}");
        }
    }

    #[test]
    fn weights_and_equal_answers_are_read_and_reported() {
        let heavy = json!({"role": "assistant", "content": "a", "weight": 0.5});
        let (row, repairs) =
            read(&json!({"prompt": [user("q")], "chosen": [heavy], "rejected": [assistant("a")]}));
        let Ok((_, Example::ChatPair { chosen, .. })) = row else { panic!("{row:?}") };
        assert_eq!(chosen.weight, 1.0);
        let repairs: Vec<_> = repairs.into_iter().collect();
        assert_eq!(repairs, [Repair::PairWeight, Repair::EqualAnswers]);
    }
}
