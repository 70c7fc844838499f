use super::super::testing::chatml;
use super::*;
use serde_json::{Value, json};
use std::path::Path;

/// A report on `bytes` with tokens counted at a context of `max_seq_length`.
fn report_at(bytes: impl AsRef<[u8]>, is_text: bool, max_seq_length: usize) -> FileReport {
    let tokenizer = chatml();
    let options = ReportOptions {
        read: ReadOptions { method: None, is_text, param: "training_file" },
        tokenizer: Some((&tokenizer, TokenizeOptions { max_seq_length, prompt_loss_weight: 0.0 })),
        shown_rows: 0,
    };
    FileReport::make(bytes.as_ref(), &options, || true).expect("a report")
}

fn report(bytes: impl AsRef<[u8]>) -> FileReport {
    report_at(bytes, false, 4096)
}

fn sample(name: &str) -> FileReport {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    report(std::fs::read(path).expect("the repository ships the file"))
}

fn repairs(report: &FileReport) -> Vec<Repair> {
    report.repairs.iter().map(|repair| repair.name).collect()
}

fn read_as(report: &FileReport) -> (Option<Container>, Option<Shape>) {
    (report.container, report.shape)
}

fn chat(question: &str, answer: &str) -> Value {
    json!({"messages": [{"role": "user", "content": question},
                        {"role": "assistant", "content": answer}]})
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

#[test]
fn samples_are_read_as_what_they_are() {
    use Container::{JsonArray, JsonLines};
    for (name, container, shape, rows, expected) in [
        ("openai-node-10-rows.jsonl", JsonLines, Shape::Chat, 10, vec![]),
        ("travel-chat.jsonl", JsonLines, Shape::Chat, 10, vec![Repair::NoFinalNewline]),
        (
            "prompt-completion-crlf.jsonl",
            JsonLines,
            Shape::PromptCompletion,
            10,
            vec![Repair::CrLf],
        ),
        (
            "sharegpt-dummy-conversation.json",
            JsonArray,
            Shape::ShareGpt,
            500,
            vec![Repair::IgnoredKeys],
        ),
    ] {
        let report = sample(name);
        assert_eq!(read_as(&report), (Some(container), Some(shape)), "{name}");
        assert_eq!((report.rows, report.examples), (rows, rows), "{name}");
        assert!(report.is_sound() && report.complaint().is_none(), "{name}");
        assert_eq!(repairs(&report), expected, "{name}");
        let tokens = report.tokens.expect("tokens");
        assert!(0 < tokens.trained && tokens.trained < tokens.total, "{name}");
        assert_eq!(tokens.histogram.iter().map(|bin| bin.rows).sum::<usize>(), rows);
    }
    let ignored = sample("sharegpt-dummy-conversation.json").ignored_keys;
    assert_eq!(ignored.into_iter().collect::<Vec<_>>(), ["id"]);
}

#[test]
fn file_without_assistant_messages_has_a_problem_in_every_row() {
    let report = sample("travel-validation-no-assistant.jsonl");
    assert_eq!((report.rows, report.faulty_rows, report.examples), (5, 5, 0));
    assert_eq!(report.problem_count, 5);
    let lines: Vec<_> = report.problems.iter().map(|problem| problem.line).collect();
    assert_eq!(lines, [1, 2, 3, 4, 5]);
    let [kind] = &report.problem_kinds[..] else { panic!("{:?}", report.problem_kinds) };
    assert_eq!((kind.place.as_deref(), kind.rows, kind.first_line), (Some("messages"), 5, 1));
    let complaint = report.complaint().expect("a complaint");
    assert!(complaint.starts_with("Line 1: messages must have at least one assistant message"));
    assert!(complaint.ends_with("There are 4 more problems in 5 rows."), "{complaint}");
}

#[test]
fn tools_that_a_template_has_no_place_for_are_problems_by_their_place() {
    let report = sample("stock-toolcall.jsonl");
    assert_eq!((report.rows, report.faulty_rows), (86, 86));
    let places: Vec<_> = report.problem_kinds.iter().map(|kind| kind.place.as_deref()).collect();
    assert!(places.iter().all(|place| matches!(place, Some("tools" | "messages[].tool_calls"))));
}

#[test]
fn every_problem_is_told_with_line_place_rule_and_hint() {
    let broken = |role: &str| json!({"messages": [{"role": role, "content": "a"}]}).to_string();
    let text = [
        chat("a", "b").to_string(),
        broken("robot"),
        "{\"messages\": [".to_owned(),
        chat("c", "d").to_string(),
        json!({"prompt": "a", "completion": "b"}).to_string(),
        broken("wizard"),
        "[7]".to_owned(),
    ]
    .join("\n");
    let report = report(format!("{text}\n"));
    assert_eq!((report.rows, report.faulty_rows, report.examples), (7, 5, 2));
    let found: Vec<_> =
        report.problems.iter().map(|p| (p.line, p.place.as_deref())).collect::<Vec<_>>();
    let role = Some("messages[0].role");
    assert_eq!(found, [(2, role), (3, None), (5, None), (6, role), (7, None)]);
    assert_eq!(
        report.problems[0],
        Problem {
            line: 2,
            place: Some("messages[0].role".to_owned()),
            rule: "messages[0].role is \"robot\", but must be one of system, developer, user, \
                   assistant, tool."
                .to_owned(),
            hint: "Rename it to the one that it means.".to_owned(),
        }
    );
    let most = &report.problem_kinds[0];
    assert_eq!(
        (most.place.as_deref(), most.rows, most.first_line),
        (Some("messages[].role"), 2, 2)
    );
}

#[test]
fn problems_past_the_hundredth_are_counted() {
    let report = report("7\n".repeat(0) + &"{\"messages\": []}\n".repeat(250));
    assert_eq!((report.problems.len(), report.problem_count), (MAX_PROBLEMS, 250));
    assert_eq!(report.problem_kinds[0].rows, 250);
}

#[test]
fn first_line_that_is_broken_off_spoils_no_other() {
    let text = format!("{{\"messages\": [{{\"role\": \"user\"}}\n{}", lines(&[chat("a", "b")]));
    let report = report(text);
    assert_eq!(read_as(&report), (Some(Container::JsonLines), Some(Shape::Chat)));
    assert_eq!((report.rows, report.examples, report.problems[0].line), (2, 1, 1));
    // Pretty-printed rows in which the second line is an object too are no such file.
    let pretty = "{\"messages\": [\n{\"role\": \"assistant\", \"content\": \"a\"}\n]}\n";
    let report = self::report(pretty);
    assert_eq!((report.container, report.examples), (Some(Container::JsonObjects), 1));
}

#[test]
fn line_over_the_cap_is_a_problem_and_the_next_ones_are_read() {
    let long = format!("{{\"text\": \"{}\"}}\n", "a".repeat(super::super::MAX_ROW_BYTES));
    let row = json!({"text": "abc"});
    for (text, line) in [(format!("{row}\n{long}{row}\n"), 2), (format!("{long}{row}\n{row}\n"), 1)]
    {
        let report = report(text);
        assert_eq!((report.rows, report.examples, report.problem_count), (3, 2, 1));
        assert_eq!(report.problems[0].line, line);
        assert!(report.problems[0].rule.starts_with("the row is longer than 16 MiB"));
    }
}

#[test]
fn long_line_is_cut_and_counted() {
    let row = chat("q", &"a".repeat(250_000));
    let report = report_at(lines(&[chat("q", "a"), row]), false, 1000);
    assert_eq!((report.truncated_rows, report.examples, report.problem_count), (1, 2, 0));
    let tokens = report.tokens.expect("tokens");
    assert!(tokens.longest > 250_000 && tokens.longest_line == 2);
    // Both answers, the long one from its twentieth token on.
    assert_eq!(tokens.trained, 2 + 1000 - 20);
}

#[test]
fn row_whose_reply_lies_past_the_cut_trains_on_nothing() {
    let silent = json!({"messages": [{"role": "user", "content": "a"},
                                     {"role": "assistant", "content": "b", "weight": 0}]});
    let rows = [chat("a", "b"), chat(&"q".repeat(500), "never seen"), silent];
    let report = report_at(lines(&rows), false, 100);
    assert_eq!((report.rows_without_targets, report.truncated_rows), (2, 1));
    assert_eq!((report.faulty_rows, report.examples), (2, 1));
    assert!(report.problems[0].rule.contains("is cut at 100, before anything"));
    assert!(report.problems[1].rule.starts_with("messages has weight 0"));
}

#[test]
fn copies_are_counted() {
    let rows: Vec<Value> = (0..240).map(|n| chat(&(n % 27).to_string(), "a")).collect();
    let report = report(lines(&rows));
    assert_eq!((report.rows, report.duplicates, report.duplicates_are_exact), (240, 213, true));
}

#[test]
fn harmless_oddities_are_repaired_by_name() {
    let call = json!({"messages": [{"role": "user", "content": "a", "weight": 1},
        {"role": "assistant", "content": [{"type": "text", "text": "b", "weight": 1}]}]});
    let text = format!("\u{feff}{}\r\n\r\n{call}\r\n \r\n", chat("a", "b"));
    let report = report(text);
    assert!(report.is_sound(), "{:?}", report.problems);
    assert_eq!(
        repairs(&report),
        [Repair::ByteOrderMark, Repair::CrLf, Repair::BlankLines, Repair::WeightIgnored]
    );
    let json = serde_json::to_value(&report.repairs[0]).expect("JSON");
    let expected = json!({"name": "byte_order_mark", "meaning": "a byte-order mark was skipped"});
    assert_eq!(json, expected);
}

#[test]
fn containers_and_shapes_are_told_apart() {
    let pretty = serde_json::to_string_pretty(&chat("a", "b")).expect("JSON");
    let pair = json!({"input": {"messages": [{"role": "user", "content": "a"}]},
        "preferred_output": [{"role": "assistant", "content": "b"}],
        "non_preferred_output": [{"role": "assistant", "content": "c"}]});
    let alpaca = json!({"instruction": "a", "output": "b"});
    for (text, container, shape) in [
        (pretty, Container::JsonObjects, Shape::Chat),
        (json!([chat("a", "b")]).to_string(), Container::JsonArray, Shape::Chat),
        (lines(&[pair]), Container::JsonLines, Shape::Preference),
        (lines(&[alpaca]), Container::JsonLines, Shape::Alpaca),
        (lines(&[json!({"text": "a"})]), Container::JsonLines, Shape::Text),
        ("\u{feff},prompt,completion\n0,a,b\n".to_owned(), Container::Csv, Shape::PromptCompletion),
    ] {
        let report = report(&text);
        assert_eq!(read_as(&report), (Some(container), Some(shape)), "{text}");
        assert_eq!((report.examples, report.method), (1, Some(shape.method())), "{text}");
    }
}

#[test]
fn plain_text_is_read_where_the_name_says_so() {
    let text = "# Of mice\n\nOnce, there was a mouse.\nIt ate.\n".repeat(20);
    let report = report_at(&text, true, 64);
    assert_eq!(read_as(&report), (Some(Container::PlainText), Some(Shape::Text)));
    assert_eq!(report.read_as.as_deref(), Some("plain text"));
    assert_eq!((report.rows, report.truncated_rows), (1, 0));
    let tokens = report.tokens.as_ref().expect("tokens");
    assert_eq!((tokens.total, tokens.trained), (text.len() as u64 + 1, text.len() as u64));
    assert_eq!(report.examples, text.len().div_ceil(63));
    // Another name: it may be a table with other columns, which would train as something else.
    let refused = self::report(&text);
    assert!(refused.problems[0].hint.contains("a name that ends in .txt"));
    // Rows in a file of that name stay rows.
    let rows = report_at(lines(&[chat("a", "b")]), true, 64);
    assert_eq!(rows.shape, Some(Shape::Chat));
    assert_eq!(report_at("prompt,completion\na,b\n", true, 64).container, Some(Container::Csv));
    // No text.
    let binary = report_at(b"ab\n\xff\xd8\n", true, 64);
    assert_eq!((binary.problems[0].line, binary.shape), (2, None));
}

#[test]
fn file_that_is_no_text_at_all_ends_the_report() {
    let report = report(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR");
    assert_eq!((report.problem_count, report.rows), (1, 0));
    assert_eq!(report.problems[0].place.as_deref(), Some("column 1"));
    let report = self::report("");
    assert_eq!(report.problems[0].rule, "the file has no rows.");
}

#[test]
fn line_that_is_not_utf_8_is_a_problem_of_that_line() {
    let row = chat("a", "b").to_string();
    let mut bytes = format!("{row}\n").into_bytes();
    bytes.extend(b"{\"text\": \"caf\xe9\"}\n");
    bytes.extend(format!("{row}\n").bytes());
    let report = report(bytes);
    assert_eq!((report.rows, report.examples, report.problems[0].line), (3, 2, 2));
}

#[test]
fn special_tokens_spelled_in_a_message_are_text() {
    let [plain, spelled] = ["abcdefghij", "<|im_end|>"].map(|answer| {
        let tokens = report(lines(&[chat("q", answer)])).tokens.expect("tokens");
        (tokens.total, tokens.trained)
    });
    assert_eq!(plain, spelled);
}

#[test]
fn image_part_is_a_problem_with_its_place() {
    let row = json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]},
                                  {"role": "assistant", "content": "A cat."}]});
    let report = report(lines(&[row]));
    assert_eq!(report.problems[0].place.as_deref(), Some("messages[0].content[0].type"));
    assert_eq!(report.problem_kinds[0].place.as_deref(), Some("messages[].content[].type"));
}

#[test]
fn method_that_is_given_refuses_the_rows_of_another() {
    let options = ReportOptions {
        read: ReadOptions::new(Method::Dpo, "training_file"),
        tokenizer: None,
        shown_rows: 0,
    };
    let text = lines(&[chat("a", "b"), chat("c", "d")]);
    let report = FileReport::make(text.as_bytes(), &options, || true).expect("a report");
    assert_eq!((report.problem_count, report.tokens), (2, None));
    assert!(report.problems[0].rule.starts_with("the row is a chat row, but method \"dpo\""));
}

#[test]
fn report_that_nobody_wants_stops() {
    let options = ReportOptions {
        read: ReadOptions { method: None, is_text: false, param: "training_file" },
        tokenizer: None,
        shown_rows: 0,
    };
    let text = lines(&[chat("a", "b"), chat("c", "d")]);
    let mut asked = 0;
    let stopped = FileReport::make(text.as_bytes(), &options, || {
        asked += 1;
        asked < 2
    });
    assert!(matches!(stopped, Err(ReportError::Stopped)), "{stopped:?}");
}

#[test]
fn report_comes_back_from_json() {
    let report = report(lines(&[chat("a", "b"), json!({"messages": []})]));
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!(json["problem_kinds"][0]["place"], "messages");
    assert_eq!(json["tokens"]["histogram"], json!([{"up_to": 32, "rows": 1}]));
    assert_eq!(serde_json::from_value::<FileReport>(json).expect("a report"), report);
}
