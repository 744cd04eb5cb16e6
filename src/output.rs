//! What the commands for people write: their answer to standard output, what is wrong in one line to standard error.

use std::{
    fmt::Write as _,
    io::{self, ErrorKind, Write},
};

use anyhow::Context;
use serde::Serialize;

/// Form of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
}

/// Writes to standard output. A reader that has seen enough (`| head`) is no error.
pub fn answer(text: &str) -> io::Result<()> {
    written(text).map(drop)
}

/// As [`answer`]; false when the reader has seen enough.
pub fn written(text: &str) -> io::Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true),
    }
}

/// Writes `answer` in the form that was asked for; `table` makes the one for people.
pub fn print(format: Format, answer: &impl Serialize, table: impl FnOnce() -> String) -> anyhow::Result<()> {
    let text = match format {
        Format::Table => table(),
        Format::Json => format!("{}\n", serde_json::to_string_pretty(answer).context("writing JSON")?),
    };
    self::answer(&text).context("writing the answer")
}

/// Writes one line to standard error, whatever line breaks the message has.
pub fn error(message: &str) {
    // when nobody can be reached there, the exit code says it
    let _ = writeln!(io::stderr(), "weft: {}", one_line(message));
}

/// Columns as wide as their widest cell, three blanks apart; no blanks at the end of a line.
pub fn columns<const N: usize>(rows: Vec<[String; N]>) -> String {
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:<width$}   ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn one_line(message: &str) -> String {
    message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_several_lines_becomes_one() {
        assert_eq!(one_line("no answer:\n  connection refused\n\n"), "no answer: connection refused");
    }
}
