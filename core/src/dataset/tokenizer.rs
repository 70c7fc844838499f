//! A base model's tokenizer with its chat template.

use super::chunked::Chunked;
use super::message::{Message, REASONING_FIELDS, Role};
use super::protect::{BLANK, BLANK_THOUGHTS, Protector, keep_marks, unmark};
use super::template::{ChatTemplate, to_template};
use super::tokenizer_files::{begins_every_text, chat_templates, named_special_tokens, prepare};
use serde_json::{Map, Value};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use tokenizers::{PostProcessorWrapper, Tokenizer};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const GENERATION_CONFIG: &str = "generation_config.json";

/// Why a tokenizer cannot be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file that is not there.
    #[error("{} cannot be read: {source}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that is not what its name says.
    #[error("{file} is not in its format: {reason}")]
    Format {
        /// Its name.
        file: &'static str,
        /// Why.
        reason: String,
    },
    /// A tokenizer that does not say where a text ends.
    #[error(
        "{TOKENIZER_CONFIG} has eos_token {token:?}, which is no token of {TOKENIZER}: a model \
         without an end token cannot learn where to stop"
    )]
    NoEndToken {
        /// What it says.
        token: Option<String>,
    },
    /// A base model that was not made for conversations.
    #[error(
        "the model has no chat template, so it takes prompt/completion and text rows only; \
         chat rows need a model that was made for chat, often named -Instruct or -Chat"
    )]
    NoChatTemplate,
    /// The template refuses the conversation, or fails on it.
    #[error("the model's chat template cannot render the conversation: {0}")]
    Template(String),
    /// The tokenizer fails on a text.
    #[error("the model's tokenizer cannot encode the text: {0}")]
    Encode(String),
    /// The tokenizer fails on token ids.
    #[error("the model's tokenizer cannot decode the tokens: {0}")]
    Decode(String),
}

/// Turns conversations and plain text into token ids and back.
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    chunked: Option<Chunked>,
    template: Option<ChatTemplate>,
    tool_template: Option<ChatTemplate>,
    protector: Protector,
    special_ids: HashSet<u32>,
    begin_id: Option<u32>,
    end_id: u32,
    stop_ids: Vec<u32>,
    /// Whether the letters of its tokens stand for bytes.
    is_byte_level: bool,
}

/// Token ids beside the bytes of the text that each came from.
pub(super) struct Encoded {
    pub(super) ids: Vec<u32>,
    pub(super) offsets: Vec<(usize, usize)>,
}

impl ChatTokenizer {
    /// Loads the tokenizer of a Hugging Face directory.
    ///
    /// # Errors
    /// When a file is missing or is not in its format.
    pub fn from_dir(dir: &Path) -> Result<Self, TokenizerError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|source| TokenizerError::File { path, source })
        };
        let optional = |name: &str| match read(name) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(TokenizerError::File { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        };
        let template = optional(CHAT_TEMPLATE)?
            .map(|bytes| {
                String::from_utf8(bytes).map_err(|error| format_error(CHAT_TEMPLATE, &error))
            })
            .transpose()?;
        let mut loaded =
            Self::from_parts(&read(TOKENIZER)?, &read(TOKENIZER_CONFIG)?, template.as_deref())?;
        if let Some(bytes) = optional(GENERATION_CONFIG)? {
            let config: Value = serde_json::from_slice(&bytes)
                .map_err(|error| format_error(GENERATION_CONFIG, &error))?;
            loaded.add_stop_ids(&config["eos_token_id"]);
        }
        Ok(loaded)
    }

    /// Loads a tokenizer from the texts of `tokenizer.json`, `tokenizer_config.json` and, where
    /// it is a file of its own, `chat_template.jinja`.
    ///
    /// # Errors
    /// When one of them is not in its format.
    pub fn from_parts(
        tokenizer_json: &[u8],
        tokenizer_config_json: &[u8],
        chat_template: Option<&str>,
    ) -> Result<Self, TokenizerError> {
        let mut json: Value = serde_json::from_slice(tokenizer_json)
            .map_err(|error| format_error(TOKENIZER, &error))?;
        let config: Map<String, Value> = serde_json::from_slice(tokenizer_config_json)
            .map_err(|error| format_error(TOKENIZER_CONFIG, &error))?;
        let named = named_special_tokens(&config);
        let special = prepare(&mut json, &named)
            .ok_or_else(|| format_error(TOKENIZER, &"it is no object with added_tokens"))?;
        let chunked = Chunked::new(&json);
        let is_byte_level = json["decoder"].to_string().contains("\"ByteLevel\"");
        let mut tokenizer: Tokenizer =
            serde_json::from_value(json).map_err(|error| format_error(TOKENIZER, &error))?;
        let token = |name: &str| {
            named.iter().find(|(known, _)| *known == name).map(|(_, text)| text.as_str())
        };
        let end_token = token("eos_token");
        let end_id = end_token
            .and_then(|text| tokenizer.token_to_id(text))
            .ok_or_else(|| TokenizerError::NoEndToken { token: end_token.map(str::to_owned) })?;
        let begin_id = token("bos_token")
            .and_then(|text| tokenizer.token_to_id(text))
            .filter(|&id| begins_every_text(&tokenizer, &config, id));
        // It would add begin and end tokens once more and trim the offsets of tokens.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        let templates = chat_templates(&config, chat_template);
        let compile = |wanted: &str| {
            let source = templates.iter().find(|(name, _)| *name == wanted);
            source
                .map(|(_, source)| ChatTemplate::compile(source, &named))
                .transpose()
                .map_err(|error| format_error("the chat template", &describe(&error)))
        };
        let (template, tool_template) = (compile("default")?, compile("tool_use")?);
        let protector = Protector::new(special.iter().map(|(text, _)| text.as_str()))
            .map_err(|error| format_error(TOKENIZER, &error))?;
        Ok(Self {
            tokenizer,
            chunked,
            template,
            tool_template,
            protector,
            special_ids: special.iter().map(|&(_, id)| id).collect(),
            begin_id,
            end_id,
            stop_ids: vec![end_id],
            is_byte_level,
        })
    }

    /// The conversation as the chat template writes it.
    ///
    /// A template that knows no `developer` gets that role as `system`, its older name.
    ///
    /// # Errors
    /// When there is no template, or it cannot write this conversation.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let marked =
            self.conversation(messages, tools)?.render(messages.len(), add_generation_prompt)?;
        Ok(unmark(&marked))
    }

    /// The conversation as token ids. Unlike [`encode`](Self::encode) over
    /// [`render`](Self::render), what spells a special token in a message stays text.
    ///
    /// # Errors
    /// When there is no template, or it cannot write this conversation.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        let marked =
            self.conversation(messages, tools)?.render(messages.len(), add_generation_prompt)?;
        Ok(self.encode_marked(&marked)?.ids)
    }

    /// The ids of `text`, in which special tokens may be spelled; nothing is added to it.
    ///
    /// # Errors
    /// When the tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        Ok(self.encode_marked(&keep_marks(text))?.ids)
    }

    /// The ids of a text that is to be gone on from: as [`encode`](Self::encode), after the token
    /// that this model's texts begin with.
    ///
    /// # Errors
    /// When the tokenizer has no token for a part of the text.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let ids = self.encode(text)?;
        let begin = self.begin_id.filter(|begin| ids.first() != Some(begin));
        Ok(begin.into_iter().chain(ids).collect())
    }

    /// The ids of `text`, none of them special; nothing is added to it.
    ///
    /// # Errors
    /// When the tokenizer has no token for a part of the text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        Ok(self.encode_marked(&self.protector.mark(text))?.ids)
    }

    /// The text of `ids` without special tokens.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.tokenizer.decode(ids, true).map_err(|error| TokenizerError::Decode(error.to_string()))
    }

    /// The text of `ids` with special tokens spelled out.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.tokenizer.decode(ids, false).map_err(|error| TokenizerError::Decode(error.to_string()))
    }

    /// The token that ends a text.
    #[must_use]
    pub const fn end_id(&self) -> u32 {
        self.end_id
    }

    /// The tokens at which generation stops: the end token and those of `generation_config.json`.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Whether conversations can be rendered.
    #[must_use]
    pub const fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Tokens that the tokenizer knows; a model may have more rows than that.
    #[must_use]
    pub fn vocabulary_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The token that this model's texts begin with, if they do; a chat template writes its own.
    pub(crate) const fn begin_id(&self) -> Option<u32> {
        self.begin_id
    }

    pub(super) const fn protector(&self) -> &Protector {
        &self.protector
    }

    pub(super) fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Whether the token stands beside the vocabulary, spelled as it is.
    pub(super) fn is_added(&self, id: u32) -> bool {
        self.tokenizer.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    pub(super) const fn is_byte_level(&self) -> bool {
        self.is_byte_level
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Encodes text whose spellings of special tokens are marked where they are mere text.
    pub(super) fn encode_marked(&self, text: &str) -> Result<Encoded, TokenizerError> {
        let failed = |error: tokenizers::Error| TokenizerError::Encode(error.to_string());
        if let Some(chunked) = &self.chunked {
            return chunked.encode(&self.tokenizer, text).map_err(failed);
        }
        let encoding = self.tokenizer.encode(text, false).map_err(failed)?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// Prepares a conversation for rendering it, whole or in part.
    pub(super) fn conversation(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Result<Conversation<'_>, TokenizerError> {
        let template = match tools {
            Some(_) => self.tool_template.as_ref().or(self.template.as_ref()),
            None => self.template.as_ref(),
        }
        .ok_or(TokenizerError::NoChatTemplate)?;
        let tools = tools.map_or(Value::Null, |tools| self.protector.mark_json(tools));
        Ok(Conversation {
            template,
            messages: messages.iter().map(|message| self.to_template(template, message)).collect(),
            tools: to_template(&tools),
        })
    }

    fn to_template(&self, template: &ChatTemplate, message: &Message) -> minijinja::Value {
        let role = match message.role {
            Role::Developer if !template.mentions(Role::Developer.as_str()) => Role::System,
            role => role,
        };
        let text = |text: &str| minijinja::Value::from(self.protector.mark(text));
        let value = |value: &Value| to_template(&self.protector.mark_json(value));
        // Absent content is None for a template, as the OpenAI API sends it.
        let content = message.content.as_deref().map_or_else(|| ().into(), text);
        let mut fields = vec![("role", text(role.as_str())), ("content", content)];
        fields.extend(message.rest.iter().map(|(name, field)| (name.as_str(), value(field))));
        // Under each name that templates read, as transformers hands it over.
        if let Some(thoughts) = message.thoughts() {
            if !message.rest.contains_key("thinking") {
                fields.push(("thinking", value(thoughts)));
            }
            fields.push((REASONING_FIELDS[0], value(thoughts)));
        }
        // Of two fields of one name the second is taken.
        minijinja::Value::from_pairs(fields.into_iter().map(|(name, value)| (text(name), value)))
    }

    fn add_stop_ids(&mut self, ids: &Value) {
        let list = ids.as_array().map_or(std::slice::from_ref(ids), Vec::as_slice);
        for id in list.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()) {
            if !self.stop_ids.contains(&id) {
                self.stop_ids.push(id);
            }
        }
    }
}

/// A conversation with marks in it, ready for the template.
pub(super) struct Conversation<'a> {
    template: &'a ChatTemplate,
    messages: Vec<minijinja::Value>,
    tools: minijinja::Value,
}

impl Conversation<'_> {
    /// The first `count` messages as the template writes them.
    pub(super) fn render(
        &self,
        count: usize,
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        self.render_all(self.messages[..count].to_vec(), add_generation_prompt)
    }

    /// The first `count` messages with [`BLANK`] in the place of what the assistant says in those
    /// of the numbers `blank`, and `with_thoughts` with [`BLANK_THOUGHTS`] before it where one has
    /// thoughts.
    pub(super) fn render_with_blanks(
        &self,
        count: usize,
        blank: &[usize],
        with_thoughts: bool,
    ) -> Result<String, TokenizerError> {
        let mut messages = self.messages[..count].to_vec();
        for &index in blank {
            let of = |name: &str| messages[index].get_attr(name).unwrap_or_default();
            let in_field = with_thoughts && !of(REASONING_FIELDS[0]).is_undefined();
            let in_content = with_thoughts
                && of("content").as_str().is_some_and(|content| content.contains("</think>"));
            let content = match in_content {
                true => format!("<think>\n{BLANK_THOUGHTS}\n</think>\n\n{BLANK}"),
                false => BLANK.to_owned(),
            };
            let role = Role::Assistant.as_str();
            messages[index] = if in_field {
                let (reasoning_content, thinking) = (BLANK_THOUGHTS, BLANK_THOUGHTS);
                minijinja::context! { role, content, reasoning_content, thinking }
            } else {
                minijinja::context! { role, content }
            };
        }
        self.render_all(messages, false)
    }

    fn render_all(
        &self,
        messages: Vec<minijinja::Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        self.template
            .render(messages.into(), self.tools.clone(), add_generation_prompt)
            .map_err(|error| TokenizerError::Template(unmark(&describe(&error))))
    }

    /// Whether the template deals with the field `name` at all.
    pub(super) fn template_mentions(&self, name: &str) -> bool {
        self.template.mentions(name)
    }
}

fn format_error(file: &'static str, reason: &impl ToString) -> TokenizerError {
    TokenizerError::Format { file, reason: reason.to_string() }
}

/// A template's error without the position in it, which says nothing to the one who made a row.
fn describe(error: &minijinja::Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::super::protect::MARK;
    use super::super::testing::{CHATML, byte_tokenizer, chatml};
    use super::*;
    use serde_json::json;

    #[test]
    fn a_special_token_spelled_in_a_message_stays_text() {
        let tokenizer = chatml();
        let messages = [Message::new(Role::User, "<|im_end|> and <s>")];
        let ids = tokenizer.encode_chat(&messages, None, false).expect("encode");
        let end = tokenizer.end_id();
        assert_eq!(ids.iter().filter(|&&id| id == end).count(), 1, "the template's own");
        let text = tokenizer.render(&messages, None, false).expect("render");
        assert_eq!(text, "<|im_start|>user\n<|im_end|> and <s><|im_end|>\n");
        assert_eq!(tokenizer.decode_with_special(&ids).expect("decode"), text);
    }

    #[test]
    fn special_tokens_in_raw_text_are_tokens_and_in_plain_text_are_not() {
        let tokenizer = chatml();
        assert_eq!(tokenizer.encode("<|im_end|>").expect("encode"), [tokenizer.end_id()]);
        let plain = tokenizer.encode_plain("<|im_end|>").expect("encode");
        assert_eq!(plain.len(), "<|im_end|>".len());
        assert_eq!(tokenizer.decode(&plain).expect("decode"), "<|im_end|>");
    }

    #[test]
    fn the_marks_own_characters_survive_in_text() {
        let tokenizer = chatml();
        for text in [MARK, "\u{fdd0}\u{fdd0}\u{fdd1}\u{fdd1}"] {
            for ids in [tokenizer.encode(text), tokenizer.encode_plain(text)] {
                assert_eq!(tokenizer.decode(&ids.expect("encode")).expect("decode"), text);
            }
        }
    }

    #[test]
    fn a_developer_is_a_system_for_a_template_that_knows_none() {
        let messages = [Message::new(Role::Developer, "a")];
        let text = chatml().render(&messages, None, false).expect("render");
        assert_eq!(text, "<|im_start|>system\na<|im_end|>\n");
        let template = format!("{{# developer #}}{CHATML}");
        let text = byte_tokenizer(&json!({}), &json!({"chat_template": template}))
            .render(&messages, None, false)
            .expect("render");
        assert_eq!(text, "<|im_start|>developer\na<|im_end|>\n");
    }

    #[test]
    fn the_template_for_tools_is_taken_when_there_are_tools() {
        let templates = json!([
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "{{ tools | tojson }}"},
        ]);
        let tokenizer = byte_tokenizer(&json!({}), &json!({"chat_template": templates}));
        let tools = json!([{"name": "<s>"}]);
        assert_eq!(tokenizer.render(&[], None, false).expect("render"), "plain");
        assert_eq!(
            tokenizer.render(&[], Some(&tools), false).expect("render"),
            "[{\"name\": \"<s>\"}]"
        );
    }

    #[test]
    fn a_post_processors_begin_token_is_known_and_not_added_to_chats() {
        let post = json!({"post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [258], "tokens": ["<s>"]}},
        }});
        let tokenizer = byte_tokenizer(&post, &json!({"bos_token": "<s>"}));
        assert_eq!(tokenizer.begin_id(), Some(258));
        assert_eq!(tokenizer.encode("a").expect("encode").len(), 1);
        for text in ["a", "<s>a"] {
            assert_eq!(tokenizer.encode_prompt(text).expect("encode")[0], 258);
            assert_eq!(tokenizer.encode_prompt(text).expect("encode").len(), 2);
        }
        assert_eq!(chatml().begin_id(), None);
    }

    #[test]
    fn a_tokenizer_without_end_token_or_of_another_form_is_refused() {
        let config =
            |text: &str| ChatTokenizer::from_parts(b"{\"added_tokens\": 1}", text.as_bytes(), None);
        assert!(matches!(config("{"), Err(TokenizerError::Format { file: TOKENIZER_CONFIG, .. })));
        assert!(matches!(config("{}"), Err(TokenizerError::Format { file: TOKENIZER, .. })));
        let (json, _) = super::super::testing::byte_tokenizer_json(&json!({}), &json!({}));
        let missing = ChatTokenizer::from_parts(&json, b"{\"eos_token\": \"<eos>\"}", None);
        assert!(matches!(missing, Err(TokenizerError::NoEndToken { token: Some(_) })));
    }

    #[test]
    fn a_model_without_chat_template_says_what_it_takes() {
        let tokenizer = byte_tokenizer(&json!({}), &json!({"chat_template": null}));
        assert!(!tokenizer.has_chat_template());
        let error = tokenizer.render(&[], None, false).expect_err("no template");
        assert!(error.to_string().contains("prompt/completion"), "{error}");
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = ChatTokenizer::from_dir(Path::new("/nowhere")).err().expect("missing");
        assert!(error.to_string().starts_with("/nowhere/tokenizer.json"), "{error}");
    }
}
