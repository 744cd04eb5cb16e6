//! Subjects from a template: `events.{aggregate_type}.{type}`.

use super::SinkError;
use crate::domain::event::{Event, escape};

/// Replaces an empty value, which would be an empty (invalid) token.
const EMPTY: &str = "_";

/// A parsed template. Values are escaped, so that each stays within its token: everything but ASCII letters, digits and
/// harmless punctuation is percent-encoded (`a.b c` → `a%2Eb%20c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
    filter: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(String),
    AggregateType,
    Type,
}

impl Template {
    pub fn parse(template: &str) -> Result<Self, SinkError> {
        let error = |why| SinkError::Template { template: template.to_owned(), why };
        let mut parts = Vec::new();
        let mut rest = template;
        while let Some((literal, tail)) = rest.split_once('{') {
            let (name, tail) = tail.split_once('}').ok_or_else(|| error("a `{` without its `}`"))?;
            parts.push(Part::Literal(literal.to_owned()));
            parts.push(match name {
                "aggregate_type" => Part::AggregateType,
                "type" => Part::Type,
                _ => return Err(error("the only placeholders are {aggregate_type} and {type}")),
            });
            rest = tail;
        }
        parts.push(Part::Literal(rest.to_owned()));
        parts.retain(|part| *part != Part::Literal(String::new()));
        let filter = filter(template);
        if filter.split('.').any(str::is_empty) {
            return Err(error("a part between two dots is empty"));
        }
        let literal = |part: &Part| if let Part::Literal(text) = part { text.clone() } else { String::new() };
        let forbidden = |c: char| !c.is_ascii_graphic() || matches!(c, '*' | '>' | '}');
        if parts.iter().any(|part| literal(part).contains(forbidden)) {
            return Err(error("blanks, `*`, `>` and other than ASCII cannot be in a subject that is published to"));
        }
        if template.starts_with('$') {
            return Err(error("subjects that begin with `$` are the server's"));
        }
        Ok(Self { parts, filter })
    }

    /// The subject of one event.
    pub fn subject(&self, event: &Event) -> String {
        let mut subject = String::with_capacity(64);
        for part in &self.parts {
            let value = match part {
                Part::Literal(text) => {
                    subject.push_str(text);
                    continue;
                }
                Part::AggregateType => event.aggregate_type.as_str(),
                Part::Type => event.kind.as_str(),
            };
            subject.push_str(&escape(if value.is_empty() { EMPTY } else { value }, is_plain));
        }
        subject
    }

    /// The wildcard subject that matches every subject of the template: `events.*.*`.
    pub fn filter(&self) -> &str {
        &self.filter
    }
}

fn filter(template: &str) -> String {
    let tokens: Vec<&str> = template.split('.').map(|token| if token.contains('{') { "*" } else { token }).collect();
    tokens.join(".")
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b'.' | b'*' | b'>' | b'%' | b'$')
}

/// Whether `filter` (with `*` and `>`) matches `subject`.
pub fn matches(filter: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for part in filter.split('.') {
        match (part, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (part, Some(token)) if part == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use uuid::Uuid;

    use super::*;
    use crate::domain::event::Position;

    fn event(aggregate_type: &str, kind: &str) -> Event {
        Event {
            id: Uuid::nil(),
            aggregate_type: aggregate_type.into(),
            aggregate_id: "1".into(),
            kind: kind.into(),
            payload: Bytes::new(),
            headers: Bytes::new(),
            created_at: 0,
            position: Position::default(),
        }
    }

    #[test]
    fn placeholders_are_replaced_by_values() {
        let template = Template::parse("events.{aggregate_type}.v1-{type}").unwrap();
        assert_eq!(template.subject(&event("order", "OrderCreated")), "events.order.v1-OrderCreated");
        assert_eq!(template.filter(), "events.*.*");
    }

    #[test]
    fn no_value_breaks_the_subject() {
        let template = Template::parse("events.{aggregate_type}.{type}").unwrap();
        for value in ["a.b", "*", ">", "a b", "a\tb", "a\r\nPUB x 0", "", "ü", "%", "$JS", "a.>", "."] {
            let subject = template.subject(&event(value, value));
            assert_eq!(subject.split('.').count(), 3, "{subject}");
            assert!(subject.split('.').all(|token| !token.is_empty() && token != "*" && token != ">"), "{subject}");
            assert!(subject.bytes().all(|b| b.is_ascii_graphic()), "{subject}");
            assert!(matches(template.filter(), &subject), "{subject}");
        }
        assert_ne!(template.subject(&event("a.b", "t")), template.subject(&event("a_b", "t")));
    }

    #[test]
    fn a_template_that_cannot_work_is_refused() {
        for template in
            ["", "events..x", "events.{id}", "events.{type", "a b", "events.*", "events.>", ".a", "a.", "$JS.API", "a}"]
        {
            assert!(Template::parse(template).is_err(), "{template}");
        }
    }

    #[test]
    fn filters_match_as_the_server_matches() {
        for (filter, subject, expected) in [
            ("a.b", "a.b", true),
            ("a.*", "a.b", true),
            ("a.*", "a.b.c", false),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            (">", "a", true),
            ("a.b", "a", false),
            ("a", "a.b", false),
        ] {
            assert_eq!(matches(filter, subject), expected, "{filter} {subject}");
        }
    }
}
