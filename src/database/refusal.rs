//! What the server said when it refused a statement, without the rows that it said it about.

use std::{error::Error, fmt};

use tokio_postgres::error::{DbError, ErrorPosition, SqlState};

/// A server's error, fit for logs and conditions: its DETAIL, HINT and CONTEXT, which quote row values, are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub message: String,
    /// SQLSTATE, five characters.
    pub code: String,
    /// Position in the text of the statement, in characters, from 1.
    pub position: Option<u32>,
}

impl Refusal {
    fn new(error: &DbError) -> Self {
        let position = match error.position() {
            Some(ErrorPosition::Original(position)) => Some(*position),
            Some(ErrorPosition::Internal { .. }) | None => None,
        };
        let code = error.code().code();
        Self { message: without_values(code, error.message()), code: code.to_owned(), position }
    }

    /// What the extended protocol answers to more than one statement, which has no code of its own.
    pub fn is_several_statements(&self) -> bool {
        self.code == "42601" && self.message.starts_with("cannot insert multiple commands")
    }

    /// The line of `sql` that the position is in, from 1.
    pub fn line(&self, sql: &str) -> Option<usize> {
        let before = usize::try_from(self.position?).ok()?.saturating_sub(1);
        Some(1 + sql.chars().take(before).filter(|&c| c == '\n').count())
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

/// Messages of class 22 (data exception) quote the value that was wrong: `invalid input syntax for type integer: "x"`. From
/// the first quote to the last nothing stays: a value may have quotes in it, and a message more than one value.
fn without_values(code: &str, message: &str) -> String {
    match (message.split_once('"'), message.rsplit_once('"')) {
        (Some((before, _)), Some((_, after))) if code.starts_with("22") => format!("{before}\"…\"{after}"),
        _ => message.to_owned(),
    }
}

/// Why a statement did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// The server refused it, and will again.
    Refused(Refusal),
    /// Somebody else held a lock for too long.
    Locked,
    /// The server or the connection went away, or there were not enough resources: repeating may help.
    Passing(String),
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(refused) if *refused.code() == SqlState::LOCK_NOT_AVAILABLE => Self::Locked,
            Some(refused) if is_passing(refused) => Self::Passing(Refusal::new(refused).to_string()),
            Some(refused) => Self::Refused(Refusal::new(refused)),
            None => Self::Passing(with_causes(&error)),
        }
    }
}

/// `error connecting to server: Connection refused (os error 111)`
fn with_causes(error: &tokio_postgres::Error) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.ends_with(&cause) { text } else { format!("{text}: {cause}") }
    })
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => refusal.fmt(f),
            Self::Locked => f.write_str("somebody else holds a lock"),
            Self::Passing(why) => f.write_str(why),
        }
    }
}

fn is_passing(error: &DbError) -> bool {
    // two sessions changed one row of a catalog, which has no code of its own
    passes(error.code()) || error.message().starts_with("tuple concurrently")
}

/// Errors that may go away by themselves, by their class (PostgreSQL's documentation, appendix A). A time-out that a
/// migration sets for itself is one: it may have waited for somebody.
fn passes(code: &SqlState) -> bool {
    const CLASSES: [&str; 4] = [
        "08", // connection exception
        "40", // transaction rollback: deadlock, serialization
        "53", // insufficient resources
        "57", // operator intervention: shutting down, starting up, cancelled
    ];
    const CODES: [&str; 4] = [
        "25P03", // idle in transaction for too long
        "25P04", // transaction time-out
        "55006", // object in use
        "58030", // input or output error
    ];
    let code = code.code();
    CODES.contains(&code) || code.get(..2).is_some_and(|class| CLASSES.contains(&class))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(position: Option<u32>) -> Refusal {
        Refusal { message: "no".into(), code: "42703".into(), position }
    }

    #[test]
    fn a_position_becomes_a_line() {
        let sql = "select 1;\nselect 'ü';\nselect x;";
        assert_eq!(refusal(Some(1)).line(sql), Some(1));
        assert_eq!(refusal(Some(11)).line(sql), Some(2));
        assert_eq!(refusal(Some(30)).line(sql), Some(3));
        assert_eq!(refusal(None).line(sql), None);
    }

    #[test]
    fn values_of_rows_are_left_out() {
        for (code, message, shown) in [
            (
                "22P02",
                "invalid input syntax for type integer: \"4111 1111\"",
                "invalid input syntax for type integer: \"…\"",
            ),
            (
                "22003",
                "value \"41111111111111111\" is out of range for type integer",
                "value \"…\" is out of range for type integer",
            ),
            ("22007", "invalid value \"4111\" for \"YYYY\"", "invalid value \"…\""),
            ("22P02", "invalid input syntax for type uuid: \"4\"11\"1\"", "invalid input syntax for type uuid: \"…\""),
            ("22012", "division by zero", "division by zero"),
        ] {
            assert_eq!(without_values(code, message), shown);
        }
        let column = "column \"limit\" does not exist";
        assert_eq!(without_values("42703", column), column);
    }

    #[test]
    fn a_server_that_starts_or_stops_is_waited_for() {
        assert!(passes(&SqlState::CANNOT_CONNECT_NOW));
        assert!(passes(&SqlState::T_R_DEADLOCK_DETECTED));
        assert!(passes(&SqlState::TOO_MANY_CONNECTIONS));
        assert!(passes(&SqlState::OBJECT_IN_USE));
        assert!(passes(&SqlState::IO_ERROR));
        assert!(!passes(&SqlState::UNDEFINED_COLUMN));
        assert!(!passes(&SqlState::INVALID_PASSWORD));
    }
}
