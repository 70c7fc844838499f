//! Files that people really upload, read as what they are.

use std::path::Path;
use tunesmith_core::dataset::{
    Container, Example, Format, Repair, Role, Rows, Shape, check_training_examples, read_rows,
};
use tunesmith_core::errors::{ApiError, ErrorCode};

fn read(name: &str) -> Result<Rows, ApiError> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    let file = std::fs::File::open(&path).expect("the repository ships the file");
    read_rows(file, "training_file")
}

fn repairs(rows: &Rows) -> Vec<Repair> {
    rows.report.repairs.iter().copied().collect()
}

#[test]
fn ten_chat_rows_are_just_enough() {
    let rows = read("openai-node-10-rows.jsonl").expect("rows");
    assert_eq!(rows.report.format, Format { container: Container::JsonLines, shape: Shape::Chat });
    assert_eq!(repairs(&rows), []);
    assert_eq!(rows.rows.len(), 10);
    assert_eq!(check_training_examples(rows.rows.len()), Ok(()));
    let lines: Vec<_> = rows.rows.iter().map(|row| row.line).collect();
    assert_eq!(lines, (1..=10).collect::<Vec<_>>());
}

#[test]
fn a_last_row_without_newline_is_read() {
    let rows = read("travel-chat.jsonl").expect("rows");
    assert_eq!(rows.rows.len(), 10);
    assert_eq!(repairs(&rows), [Repair::NoFinalNewline]);
}

#[test]
fn a_file_without_assistant_messages_is_refused_saying_so() {
    let error = read("travel-validation-no-assistant.jsonl").expect_err("no assistant");
    assert_eq!(error.code, ErrorCode::InvalidFileFormat);
    assert_eq!(
        error.message,
        "Line 1: messages must have at least one assistant message, but has none. End the \
         conversation with the answer that the model should learn, {\"role\": \"assistant\", \
         \"content\": …}."
    );
}

#[test]
fn tool_calls_without_content_are_read_with_their_arguments_as_objects() {
    let rows = read("stock-toolcall.jsonl").expect("rows");
    assert_eq!(rows.rows.len(), 86);
    assert_eq!(repairs(&rows), []);
    let Example::Chat { messages, tools } = &rows.rows[0].example else {
        panic!("{:?}", rows.rows[0]);
    };
    assert_eq!(tools.as_ref().and_then(|tools| tools.as_array()).map(Vec::len), Some(2));
    let call = messages.iter().find(|message| message.has_tool_calls()).expect("a call");
    assert_eq!((call.role, &call.content), (Role::Assistant, &None));
    let arguments = &call.rest["tool_calls"][0]["function"]["arguments"];
    assert_eq!(arguments.to_string(), "{\"symbol\":\"BAC\",\"period\":\"1mo\"}");
}

#[test]
fn an_array_of_sharegpt_conversations_is_read_as_chats() {
    let rows = read("sharegpt-dummy-conversation.json").expect("rows");
    assert_eq!(
        rows.report.format,
        Format { container: Container::JsonArray, shape: Shape::ShareGpt }
    );
    assert_eq!(rows.rows.len(), 500);
    assert_eq!((rows.rows[0].line, rows.rows[1].line), (2, 23));
    let Example::Chat { messages, .. } = &rows.rows[0].example else {
        panic!("{:?}", rows.rows[0]);
    };
    let roles: Vec<_> = messages.iter().map(|message| message.role).collect();
    assert_eq!(roles, [Role::User, Role::Assistant, Role::User, Role::Assistant]);
}

#[test]
fn prompt_completion_rows_with_crlf_are_read() {
    let rows = read("prompt-completion-crlf.jsonl").expect("rows");
    assert_eq!(
        rows.report.format,
        Format { container: Container::JsonLines, shape: Shape::PromptCompletion }
    );
    assert_eq!(repairs(&rows), [Repair::CrLf]);
    let Example::PromptCompletion { prompt, .. } = &rows.rows[0].example else {
        panic!("{:?}", rows.rows[0]);
    };
    assert_eq!(prompt, "Question: What is DevAide?");
}

#[test]
fn copies_of_rows_are_read_and_counted() {
    let row = |n: usize| format!("{{\"prompt\": \"{n}\", \"completion\": \"a\"}}\n");
    let text: String = (0..240).map(|n| row(n % 27)).collect();
    let rows = read_rows(text.as_bytes(), "training_file").expect("rows");
    assert_eq!((rows.rows.len(), rows.report.duplicates), (240, 213));
}

#[test]
fn an_image_is_refused_with_its_place() {
    let text = r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}]}, {"role": "assistant", "content": "A cat."}]}"#;
    let error = read_rows(text.as_bytes(), "validation_file").expect_err("image");
    assert_eq!(error.param.as_deref(), Some("validation_file"));
    assert_eq!(
        error.message,
        "Line 1: messages[0].content[0].type is \"image_url\", but must be \"text\". Only text is \
         read: remove images, audio and files."
    );
}
