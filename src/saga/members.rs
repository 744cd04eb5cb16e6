//! The members of a JSON object that a strict parser may refuse.
//!
//! What a participant writes about an error or a job decides how a saga continues, so as much of it is read as can be. Members are
//! found by their delimiters alone, and only those that are asked for are decoded: a number beyond every float, a lone
//! surrogate, deep nesting or a missing end loses the member that has it, and no other. Nothing recurses.

use std::borrow::Cow;

/// Name and value of each complete member, as they are written. A name that has escapes is not recognised.
#[derive(Debug)]
pub(super) struct Members<'a>(Vec<(&'a str, &'a str)>);

/// The text of a body, without a byte order mark; what is not UTF-8 is replaced.
pub(super) fn text(body: &[u8]) -> Cow<'_, str> {
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    String::from_utf8_lossy(body.trim_ascii())
}

impl<'a> Members<'a> {
    /// `None` when `text` does not begin with an object. What follows the first fault is not read.
    pub(super) fn of(text: &'a str) -> Option<Self> {
        let mut rest = text.strip_prefix('{')?;
        let mut members = Vec::new();
        while let Some((name, value, after)) = member(rest) {
            members.push((name, value));
            rest = after;
        }
        Some(Self(members))
    }

    /// The last one, as most parsers do.
    fn get(&self, name: &str) -> Option<&'a str> {
        self.0.iter().rfind(|(known, _)| *known == name).map(|(_, value)| *value)
    }

    pub(super) fn string(&self, name: &str) -> Option<String> {
        self.get(name).and_then(string)
    }

    /// The digits, with the sign.
    pub(super) fn integer(&self, name: &str) -> Option<&'a str> {
        self.get(name).filter(|value| {
            let digits = value.strip_prefix('-').unwrap_or(value);
            !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
        })
    }

    pub(super) fn boolean(&self, name: &str) -> Option<bool> {
        self.get(name).and_then(|value| value.parse().ok())
    }

    pub(super) fn object(&self, name: &str) -> Option<Self> {
        self.get(name).and_then(Self::of)
    }
}

/// A word in lower case and without separators: `in_progress`, `In progress` and `InProgress` are one.
pub(super) fn letters(word: &str) -> String {
    word.chars().filter(char::is_ascii_alphanumeric).map(|letter| letter.to_ascii_lowercase()).collect()
}

/// The text of a JSON string. One with a fault, such as a lone surrogate, is returned as it is written.
pub(super) fn string(value: &str) -> Option<String> {
    let written = value.strip_prefix('"')?.strip_suffix('"')?;
    Some(serde_json::from_str(value).unwrap_or_else(|_| written.to_owned()))
}

/// The next member's name, its value, and what follows.
fn member(text: &str) -> Option<(&str, &str, &str)> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == ',');
    let (name, rest) = split_value(text)?;
    let name = name.strip_prefix('"')?.strip_suffix('"')?;
    let (value, rest) = split_value(rest.trim_start().strip_prefix(':')?.trim_start())?;
    Some((name, value.trim_end(), rest))
}

/// Splits after the value at the beginning. `None` when there is none, or its end is missing.
fn split_value(text: &str) -> Option<(&str, &str)> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => {
                in_string = !in_string;
                if depth == 0 && !in_string {
                    return text.split_at_checked(at + 1);
                }
            }
            _ if in_string => {}
            b'[' | b'{' => depth += 1,
            b']' | b'}' if depth > 0 => {
                depth -= 1;
                if depth == 0 {
                    return text.split_at_checked(at + 1);
                }
            }
            b',' | b']' | b'}' if depth == 0 => return if at > 0 { text.split_at_checked(at) } else { None },
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_loses_the_member_that_has_it_and_no_other() {
        let deep = format!("{}{}", "[{\"a\":".repeat(30_000), "}]".repeat(30_000));
        for before in [
            r#""a": "\ud83d""#,
            r#""\ud83d": 1"#,
            r#""a": 1e400"#,
            r#""a": NaN"#,
            r#""a": [1, {"b": "]}\""}, "\\"]"#,
            "\"a\": \"two\nlines\"",
            &format!("\"a\": {deep}"),
            r#""a": {}"#,
            r#""a": "" ,"#,
        ] {
            for after in ["}", ", }", r#", "b": "cut o"#, r#", "b": [1"#, r#", "b""#, ""] {
                let text = format!("{{ {before} , \"code\" : \"NoSlot\" {after}");
                let members = Members::of(&text).unwrap();
                assert_eq!(members.string("code").as_deref(), Some("NoSlot"), "{before} {after}");
            }
        }
        assert_eq!(Members::of(r#"{"a": "\ud83d"}"#).unwrap().string("a").as_deref(), Some(r"\ud83d"));
        assert_eq!(Members::of("{\"a\": \"1\\n2\n3\"}").unwrap().string("a").as_deref(), Some("1\\n2\n3"));
    }

    #[test]
    fn members_are_read_by_type() {
        let text = r#"{"s": "é\u00e9", "i": -12, "f": 1.5, "t": true, "o": {"s": "in"}, "n": null, "i": 34}"#;
        let members = Members::of(text).unwrap();
        assert_eq!(members.string("s").as_deref(), Some("éé"));
        assert_eq!(members.integer("i"), Some("34"), "the last one");
        assert_eq!((members.integer("f"), members.integer("t"), members.integer("none")), (None, None, None));
        assert_eq!((members.boolean("t"), members.boolean("n")), (Some(true), None));
        assert_eq!(members.object("o").unwrap().string("s").as_deref(), Some("in"));
        assert!(members.object("s").is_none() && members.string("o").is_none());
        for text in ["", "[1]", "null", "\"{}\"", "<html>"] {
            assert!(Members::of(text).is_none(), "{text}");
        }
        for text in ["{", "{}", "{1: 2}", "{\"a\"", "{\"a\":", "{\"a\": 1", "{]"] {
            assert_eq!(Members::of(text).unwrap().0, [], "{text}");
        }
    }
}
