//! Where an event goes: a template such as `events.{namespace}.{service}.{aggregate_type}.{type}`, filled with its values.
//!
//! Values are escaped in the [`Style`] of the broker, so that none reaches beyond its place.

use std::borrow::Cow;

use super::event::{Event, decode, escape};

/// Replaces an empty value, which would be an empty (invalid) token.
const EMPTY: &str = "_";
/// Matches one token.
const WILDCARD: &str = "*";

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the template {template:?} is not usable: {why}")]
pub struct TemplateError {
    pub template: String,
    pub why: &'static str,
}

/// The form of a broker's destinations, and how values are escaped in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Tokens with dots between them, as the subjects of NATS are. Everything but ASCII letters, digits and harmless
    /// punctuation is percent-encoded: `a.b c` is `a%2Eb%20c`.
    Subject,
    /// A topic of Kafka: letters, digits, `.`, `_` and `-`. Other bytes of a value, and its dots, become `_` and two digits:
    /// `a.b c` is `a_2Eb_20c`.
    Topic,
    /// Percent-encoded but for letters, digits, `-`, `_` and `~`, as it has to be in the path of a URL; and since a path may
    /// not have `.` and `..` however they are written, these become `_`.
    Plain,
}

/// A parsed template. The namespace and the service are those of the outbox, so they are filled in already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    style: Style,
    parts: Vec<Part>,
    shared: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(String),
    AggregateType,
    AggregateId,
    Type,
    Header(String),
}

impl Template {
    pub fn parse(template: &str, namespace: &str, service: &str, style: Style) -> Result<Self, TemplateError> {
        let error = |why| TemplateError { template: template.to_owned(), why };
        let mut parts = Vec::new();
        let mut rest = template;
        let literal = |text: &str| style.check(text).map(|()| Part::Literal(text.to_owned())).map_err(error);
        while let Some((before, tail)) = rest.split_once('{') {
            let (name, tail) = tail.split_once('}').ok_or_else(|| error("a `{` without its `}`"))?;
            parts.push(literal(before)?);
            parts.push(match name {
                "namespace" => Part::Literal(style.value(namespace).into_owned()),
                "service" => Part::Literal(style.value(service).into_owned()),
                "aggregate_type" => Part::AggregateType,
                "aggregate_id" => Part::AggregateId,
                "type" => Part::Type,
                _ => match name.strip_prefix("header:") {
                    Some(header) if !header.is_empty() && !header.contains('.') => Part::Header(header.to_owned()),
                    _ => {
                        return Err(error(
                            "placeholders are {namespace}, {service}, {aggregate_type}, {aggregate_id}, {type} and {header:NAME}, without dots",
                        ));
                    }
                },
            });
            rest = tail;
        }
        parts.push(literal(rest)?);
        let tokens = template.split('.').map(|token| if token.contains('{') { WILDCARD } else { token });
        let shared = tokens.collect::<Vec<_>>().join(".");
        if style == Style::Subject && shared.split('.').any(str::is_empty) {
            return Err(error("a part between two dots is empty"));
        }
        if style == Style::Subject && template.starts_with('$') {
            return Err(error("subjects that begin with `$` are the server's"));
        }
        if template.is_empty() {
            return Err(error("it is empty"));
        }
        Ok(Self { style, parts, shared })
    }

    /// Appends the destination of one event.
    pub fn write(&self, event: &Event, destination: &mut String) {
        for part in &self.parts {
            let found = match part {
                Part::Literal(text) => {
                    destination.push_str(text);
                    continue;
                }
                Part::AggregateType => Cow::Borrowed(event.aggregate_type.as_str()),
                Part::AggregateId => Cow::Borrowed(event.aggregate_id.as_str()),
                Part::Type => Cow::Borrowed(event.kind.as_str()),
                Part::Header(name) => Cow::Owned(event.header(name).unwrap_or_default()),
            };
            destination.push_str(&self.style.value(&found));
        }
    }

    /// The narrowest filter that matches every event of the outbox that has this type; `None`: of any type.
    pub fn filter(&self, event_type: Option<&str>) -> String {
        let mut filled = String::new();
        for part in &self.parts {
            match (part, event_type) {
                (Part::Literal(text), _) => filled.push_str(text),
                (Part::Type, Some(event_type)) => filled.push_str(&self.style.value(event_type)),
                _ => filled.push_str(WILDCARD),
            }
        }
        let tokens = filled.split('.').map(|token| if token.contains(WILDCARD) { WILDCARD } else { token });
        tokens.collect::<Vec<_>>().join(".")
    }

    /// The event type in `destination`, which matches this template; `None` where the type is no part of its own there.
    pub fn type_of(&self, destination: &str) -> Option<String> {
        const TYPE: &str = "\u{1}";
        let mut filled = String::new();
        for part in &self.parts {
            filled.push_str(match part {
                Part::Literal(text) => text,
                Part::Type => TYPE,
                _ => WILDCARD,
            });
        }
        let place = filled.split('.').position(|token| token == TYPE)?;
        Some(decode(destination.split('.').nth(place)?).into_owned())
    }

    /// The filter that matches the events of every outbox with this template: `events.*.*.*.*`.
    pub fn shared_filter(&self) -> &str {
        &self.shared
    }
}

impl Style {
    /// Whether what a person wrote between the placeholders may be there.
    fn check(self, text: &str) -> Result<(), &'static str> {
        let graphic = text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'}');
        match self {
            Self::Subject if !graphic || text.contains(['*', '>']) => {
                Err("blanks, `*`, `>` and other than ASCII cannot be in a subject that is published to")
            }
            Self::Topic
                if !text.bytes().all(|byte| matches!(byte, b'.' | b'_' | b'-') || byte.is_ascii_alphanumeric()) =>
            {
                Err("a topic has letters, digits, `.`, `_` and `-`")
            }
            Self::Plain if !graphic => Err("blanks and other than ASCII cannot be in it"),
            Self::Subject | Self::Topic | Self::Plain => Ok(()),
        }
    }

    fn value(self, value: &str) -> Cow<'_, str> {
        let value = if value.is_empty() { EMPTY } else { value };
        match self {
            Self::Subject => {
                escape(value, |byte| byte.is_ascii_graphic() && !matches!(byte, b'.' | b'*' | b'>' | b'%' | b'$'))
            }
            Self::Topic => match escape(value, |byte| matches!(byte, b'_' | b'-') || byte.is_ascii_alphanumeric()) {
                Cow::Owned(escaped) => Cow::Owned(escaped.replace('%', "_")),
                plain @ Cow::Borrowed(_) => plain,
            },
            Self::Plain if matches!(value, "." | "..") => Cow::Borrowed(EMPTY),
            Self::Plain => escape(value, |byte| matches!(byte, b'_' | b'-' | b'~') || byte.is_ascii_alphanumeric()),
        }
    }
}

/// Whether `filter` (with `*` and `>`) matches `destination`.
pub fn matches(filter: &str, destination: &str) -> bool {
    let mut tokens = destination.split('.');
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
    use super::*;
    use crate::domain::event::{Position, Text};
    use bytes::Bytes;

    const DEFAULT: &str = "events.{namespace}.{service}.{aggregate_type}.{type}";

    fn parse(template: &str) -> Template {
        Template::parse(template, "shop", "orders", Style::Subject).unwrap()
    }

    fn of(template: &Template, event: &Event) -> String {
        let mut destination = String::new();
        template.write(event, &mut destination);
        destination
    }

    fn event(aggregate_type: &str, kind: &str) -> Event {
        Event {
            id: Text::default(),
            content_type: Text::default(),
            aggregate_type: aggregate_type.to_owned().into(),
            aggregate_id: "1".into(),
            kind: kind.to_owned().into(),
            payload: Bytes::new(),
            headers: Bytes::from_static(br#"{"X-Tenant": "a.b", "n": 7, "list": []}"#),
            context: Bytes::new(),
            created_at: None,
            position: Position::default(),
        }
    }

    #[test]
    fn placeholders_are_replaced_by_values() {
        for (template, destination, filter, shared) in [
            (DEFAULT, "events.shop.orders.order.OrderCreated", "events.shop.orders.*.*", "events.*.*.*.*"),
            ("{service}.{aggregate_type}.v1-{type}", "orders.order.v1-OrderCreated", "orders.*.*", "*.*.*"),
            ("e.{namespace}-{service}.{aggregate_id}", "e.shop-orders.1", "e.shop-orders.*", "e.*.*"),
            ("e.{header:X-Tenant}.{header:n}", "e.a%2Eb.7", "e.*.*", "e.*.*"),
            ("e.{header:none}.{header:list}", "e._._", "e.*.*", "e.*.*"),
            ("e.all", "e.all", "e.all", "e.all"),
        ] {
            let parsed = parse(template);
            assert_eq!(of(&parsed, &event("order", "OrderCreated")), destination, "{template}");
            assert_eq!((parsed.filter(None).as_str(), parsed.shared_filter()), (filter, shared), "{template}");
        }
    }

    #[test]
    fn outboxes_of_one_template_have_destinations_of_their_own() {
        for (namespace, service) in [("delivery", "orders"), ("shop", "customers"), ("shop.orders", "x")] {
            let other = of(
                &Template::parse(DEFAULT, namespace, service, Style::Subject).unwrap(),
                &event("order", "OrderCreated"),
            );
            assert!(!matches(&parse(DEFAULT).filter(None), &other), "{other}");
            assert!(matches(parse(DEFAULT).shared_filter(), &other), "{other}");
        }
    }

    #[test]
    fn a_filter_for_a_type_is_as_narrow_as_it_can_be() {
        for (template, event_type, filter) in [
            (DEFAULT, "OrderCreated", "events.shop.orders.*.OrderCreated"),
            ("{type}", "OrderCreated", "OrderCreated"),
            ("shop.v1-{type}.x", "Order_Created-2", "shop.v1-Order_Created-2.x"),
            ("shop.{aggregate_type}-{type}", "OrderCreated", "shop.*"),
            ("shop.{aggregate_type}", "OrderCreated", "shop.*"),
            ("shop.all", "OrderCreated", "shop.all"),
            ("shop.{type}", "Order.Created", "shop.Order%2ECreated"),
            ("shop.{type}", "", "shop._"),
        ] {
            let template = parse(template);
            assert_eq!(template.filter(Some(event_type)), filter, "{template:?} {event_type}");
            assert!(matches(filter, &of(&template, &event("order", event_type))), "{filter}");
        }
    }

    #[test]
    fn no_value_breaks_the_destination() {
        for value in ["a.b", "*", ">", "a b", "a\tb", "a\r\nPUB x 0", "", "ü", "%", "$JS", "a.>", "."] {
            let template = Template::parse(DEFAULT, value, value, Style::Subject).unwrap();
            let destination = of(&template, &event(value, value));
            assert_eq!(destination.split('.').count(), 5, "{destination}");
            assert!(
                destination.split('.').all(|token| !token.is_empty() && token != "*" && token != ">"),
                "{destination}"
            );
            assert!(destination.bytes().all(|b| b.is_ascii_graphic()), "{destination}");
            assert!(matches(&template.filter(None), &destination), "{destination}");
        }
        let template = parse(DEFAULT);
        assert_ne!(of(&template, &event("a.b", "t")), of(&template, &event("a_b", "t")));
    }

    #[test]
    fn a_template_that_cannot_work_is_refused() {
        for template in [
            "",
            "events..x",
            "events.{id}",
            "events.{header:}",
            "events.{header:a.b}",
            "events.{type",
            "a b",
            "events.*",
            "events.>",
            ".a",
            "a.",
            "$JS.API",
            "a}",
        ] {
            assert!(Template::parse(template, "shop", "orders", Style::Subject).is_err(), "{template}");
        }
    }

    #[test]
    fn the_type_is_read_from_a_destination_where_it_has_a_part_of_its_own() {
        let type_of = |template: &str, subject: &str| parse(template).type_of(subject);
        let subject = "events.shop.orders.order.Order%2ECreated";
        let own = "events.{namespace}.{service}.{aggregate_type}.{type}";
        assert_eq!(type_of(own, subject).as_deref(), Some("Order.Created"));
        assert_eq!(type_of(own, "events.shop").as_deref(), None);
        assert_eq!(type_of("events.{aggregate_type}-{type}", "events.order-OrderCreated"), None);
        assert_eq!(type_of("events.{aggregate_type}", "events.order"), None);
    }

    #[test]
    fn a_value_stays_in_its_place_in_every_style() {
        for (style, template, id, expected) in [
            (Style::Topic, "{namespace}.{aggregate_id}", "a.b c_d", "shop.a_2Eb_20c_d"),
            (Style::Topic, "{service}-{aggregate_id}", "", "orders-_"),
            (Style::Plain, "http://h/{service}/{aggregate_id}", "../ä?x#y", "http://h/orders/%2E%2E%2F%C3%A4%3Fx%23y"),
            (Style::Plain, "http://h/{aggregate_id}/x", "..", "http://h/_/x"),
            (Style::Plain, "{aggregate_id}", ".", "_"),
        ] {
            let template = Template::parse(template, "shop", "orders", style).unwrap();
            let event = Event { aggregate_id: id.to_owned().into(), ..event("order", "OrderCreated") };
            assert_eq!(of(&template, &event), expected);
        }
        for (style, template) in [
            (Style::Topic, "a b"),
            (Style::Topic, "a/{type}"),
            (Style::Topic, ""),
            (Style::Plain, "a b"),
            (Style::Plain, ""),
        ] {
            assert!(Template::parse(template, "shop", "orders", style).is_err(), "{template}");
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
