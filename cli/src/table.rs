//! Lists for a person: columns as wide as their longest cell.

use time::OffsetDateTime;
use time::macros::format_description;

/// Lays `rows` out under `header`; columns are two spaces apart and lines end with their last
/// cell. Control characters, which a name or a message may hold, become spaces.
pub(crate) fn render<const COLUMNS: usize>(
    header: [&str; COLUMNS],
    rows: &[[String; COLUMNS]],
) -> String {
    let mut lines = vec![header.map(str::to_owned)];
    lines.extend(rows.iter().map(|row| row.each_ref().map(|cell| one_line(cell))));
    let widths: [usize; COLUMNS] = std::array::from_fn(|column| {
        lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
    });
    let mut text = String::new();
    for line in &lines {
        let padded: Vec<String> =
            line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// `text` without anything that could move a terminal's cursor.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A Unix time in UTC, to the second.
pub(crate) fn time(unix_seconds: i64) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    OffsetDateTime::from_unix_timestamp(unix_seconds)
        .ok()
        .and_then(|time| time.format(format).ok())
        .unwrap_or_else(|| unix_seconds.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_have_no_trailing_spaces() {
        let rows = [["a".to_owned(), "short".to_owned()], ["längere".to_owned(), String::new()]];
        assert_eq!(render(["ID", "NAME"], &rows), "ID       NAME\na        short\nlängere\n");
    }

    #[test]
    fn times_are_utc_and_one_out_of_range_stays_a_number() {
        assert_eq!(time(1_700_000_000), "2023-11-14 22:13:20");
        assert_eq!(time(i64::MAX), i64::MAX.to_string());
    }

    #[test]
    fn an_escape_sequence_in_a_cell_cannot_reach_the_terminal() {
        let rows = [["\u{1b}[2Jx\ny".to_owned()]];
        assert_eq!(render(["NAME"], &rows), "NAME\n [2Jx y\n");
    }
}
