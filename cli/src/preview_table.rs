//! A preview of a job, for a person.

use crate::table::{self, one_line};
use serde_json::Value;
use std::fmt::Write as _;

/// Tokens of a row that are printed.
const SHOWN_TOKENS: usize = 40;

/// Lays out what the server says of a job.
pub(crate) fn render(preview: &Value) -> String {
    let mut text = String::new();
    refusals(&mut text, preview);
    list(&mut text, "WARNINGS", &preview["warnings"]);
    files(&mut text, preview);
    hyperparameters(&mut text, &preview["hyperparameters"]);
    estimates(&mut text, preview);
    first_rows(&mut text, &preview["first_rows"]);
    text
}

fn refusals(text: &mut String, preview: &Value) {
    let refusals = preview["refusals"].as_array().map_or(&[][..], Vec::as_slice);
    if refusals.is_empty() {
        text.push_str("The job would run.\n");
        return;
    }
    text.push_str("The job would be refused:\n\n");
    let row = |refusal: &Value| ["code", "param", "message"].map(|key| shown(&refusal[key]));
    let rows: Vec<_> = refusals.iter().map(row).collect();
    text.push_str(&table::render(["CODE", "PARAMETER", "MESSAGE"], &rows));
}

fn list(text: &mut String, header: &str, sentences: &Value) {
    let rows: Vec<_> = sentences.as_array().into_iter().flatten().map(|s| [shown(s)]).collect();
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&table::render([header], &rows));
    }
}

fn files(text: &mut String, preview: &Value) {
    let mut rows = Vec::new();
    for name in ["training_file", "validation_file"] {
        let file = &preview[name];
        if file.is_null() {
            continue;
        }
        let tokens = &file["tokens"];
        rows.push([
            name.to_owned(),
            shown(&file["read_as"]),
            shown(&file["rows"]),
            shown(&file["faulty_rows"]),
            shown(&file["duplicates"]),
            shown(&file["truncated_rows"]),
            shown(&tokens["total"]),
            shown(&tokens["trained"]),
            shown(&tokens["longest"]),
        ]);
    }
    if rows.is_empty() {
        return;
    }
    text.push('\n');
    let header =
        ["FILE", "READ AS", "ROWS", "FAULTY", "COPIES", "CUT", "TOKENS", "TRAINED", "LONGEST ROW"];
    text.push_str(&table::render(header, &rows));
    for name in ["training_file", "validation_file"] {
        for repair in preview[name]["repairs"].as_array().into_iter().flatten() {
            let _ = writeln!(text, "{name}: {}", shown(&repair["meaning"]));
        }
    }
}

fn hyperparameters(text: &mut String, hyperparameters: &Value) {
    let Some(fields) = hyperparameters.as_object() else { return };
    let rows: Vec<_> = fields.iter().map(|(name, value)| [name.clone(), shown(value)]).collect();
    text.push('\n');
    text.push_str(&table::render(["HYPERPARAMETER", "VALUE"], &rows));
}

fn estimates(text: &mut String, preview: &Value) {
    let steps = &preview["steps"];
    if steps.is_null() {
        return;
    }
    let number = |value: &Value, show: fn(f64) -> String| {
        value.as_f64().map_or_else(|| "unknown".to_owned(), show)
    };
    let money = format!(
        "{} {}",
        number(&preview["cost"]["amount"], |amount| format!("{amount:.2}")),
        shown(&preview["cost"]["currency"])
    );
    let basis = |part: &str| shown(&preview[part]["basis"]);
    let rows = [
        [
            "steps".to_owned(),
            shown(&steps["total"]),
            format!(
                "{} an epoch, {} examples each; {} train and {} are held out.",
                steps["per_epoch"],
                steps["examples_per_step"],
                steps["train_examples"],
                steps["held_out_examples"]
            ),
        ],
        [
            "tokens".to_owned(),
            number(&preview["tokens"]["value"], |tokens| format!("{tokens:.0}")),
            basis("tokens"),
        ],
        ["time".to_owned(), number(&preview["time"]["value"], duration), basis("time")],
        [
            "peak memory".to_owned(),
            number(&preview["memory"]["peak_bytes"], |bytes| {
                format!("{:.2} GiB", bytes / f64::from(1 << 30))
            }),
            basis("memory"),
        ],
        ["cost".to_owned(), money, basis("cost")],
    ];
    text.push('\n');
    text.push_str(&table::render(["ESTIMATE", "VALUE", "BASIS"], &rows));
}

fn first_rows(text: &mut String, rows: &Value) {
    for row in rows.as_array().into_iter().flatten() {
        let tokens = row["tokens"].as_array().map_or(&[][..], Vec::as_slice);
        let answer = row["answer"].as_str().map(|answer| format!(", {answer} answer"));
        let _ = writeln!(
            text,
            "\nLine {}{}: the first {} of {} tokens",
            row["line"],
            answer.unwrap_or_default(),
            tokens.len().min(SHOWN_TOKENS),
            row["token_count"]
        );
        let cells = |token: &Value| {
            // In quotes, so that a space is seen.
            [token["id"].to_string(), weight(&token["weight"]), token["text"].to_string()]
        };
        let rows: Vec<_> = tokens.iter().take(SHOWN_TOKENS).map(cells).collect();
        text.push_str(&table::render(["ID", "WEIGHT", "TEXT"], &rows));
    }
}

/// A weight that was an f32, without the digits that it never had.
fn weight(value: &Value) -> String {
    value.as_f64().map_or_else(String::new, |weight| (weight as f32).to_string())
}

/// Text as it is, and anything else as JSON; nothing for null.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => one_line(text),
        other => other.to_string(),
    }
}

fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds} s"),
        (0, minutes) => format!("{minutes} min {} s", seconds % 60),
        (hours, minutes) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn refusals_come_first_with_where_and_why() {
        let text = render(&json!({
            "would_run": false,
            "refusals": [{"code": "invalid_value", "param": "seed", "message": "Invalid\nseed."}],
        }));
        assert_eq!(
            text,
            "The job would be refused:\n\nCODE           PARAMETER  MESSAGE\n\
             invalid_value  seed       Invalid seed.\n"
        );
    }

    #[test]
    fn tokens_are_shown_with_their_spaces_and_weights() {
        let text = render(&json!({
            "would_run": true, "refusals": [],
            "first_rows": [{"line": 4, "token_count": 9,
                            "tokens": [{"id": 7, "text": " a\n", "weight": 0.1_f32}]}],
        }));
        assert!(text.starts_with("The job would run.\n"), "{text}");
        let rows = "Line 4: the first 1 of 9 tokens\nID  WEIGHT  TEXT\n7   0.1     \" a\\n\"\n";
        assert!(text.ends_with(rows), "{text}");
    }

    #[test]
    fn what_cannot_be_estimated_is_unknown_and_says_why() {
        let amount = |value: Value| json!({"value": value, "basis": "because"});
        let text = render(&json!({
            "steps": {"total": 8, "per_epoch": 4, "examples_per_step": 4, "train_examples": 16,
                      "held_out_examples": 4},
            "tokens": amount(json!(1200.0)), "time": amount(json!(3725.0)),
            "memory": {"peak_bytes": null, "basis": "no sizes"},
            "cost": {"amount": 1.5, "currency": "EUR", "basis": "by the hour"},
        }));
        for line in ["time         1 h 2 min  because", "peak memory  unknown    no sizes"] {
            assert!(text.contains(line), "{text}");
        }
        assert!(text.contains("1.50 EUR"), "{text}");
    }
}
