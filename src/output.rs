//! What the commands for people write: their answer to standard output, what is wrong in one line to standard error.

use std::io::{self, ErrorKind, Write};

/// Writes to standard output. A reader that has seen enough (`| head`) is no error.
pub fn answer(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes one line to standard error, whatever line breaks the message has.
pub fn error(message: &str) {
    // when nobody can be reached there, the exit code says it
    let _ = writeln!(io::stderr(), "weft: {}", one_line(message));
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
