//! Which JSON is accepted from outside: what is stored must be readable for as long as its instance lives.
//!
//! An input is kept as text and parsed again for each expression. A text that a tolerant parser accepts and a strict one does
//! not (a lone surrogate, a number beyond every float) would make every later call fail, undos included. So it is judged
//! once, before anything is stored. Numbers are 64-bit integers and floats in expressions (RFC 8259 §6 calls no others
//! interoperable): one that would change on the way to a participant is refused too.

use serde::de::IgnoredAny;
use serde_json::{Value, value::RawValue};

use super::state::Json;

/// Deepest nesting of arrays and objects. Less than the 128 of usual parsers, since what is sent and shown wraps an input.
const MAX_DEPTH: usize = 100;

/// Why a text is not accepted. Has no value of the text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    #[error("it is not JSON: {0}")]
    NotJson(String),
    #[error("arrays and objects are nested deeper than {MAX_DEPTH}")]
    Depth,
    #[error("the number at byte {0} has more digits than a 64-bit integer or float keeps: send it as a string")]
    Number(usize),
}

/// The JSON of a text that everybody reads alike, or why it has none.
pub fn admit(text: &[u8]) -> Result<Json, Unusable> {
    let not_json = |error: serde_json::Error| Unusable::NotJson(error.to_string());
    // the cheap parser first: the scan below needs well-formed tokens, and the strict parser recurses
    serde_json::from_slice::<IgnoredAny>(text).map_err(not_json)?;
    scan(text)?;
    serde_json::from_slice::<Value>(text).map_err(not_json)?;
    serde_json::from_slice::<Box<RawValue>>(text).map(Json::from).map_err(not_json)
}

/// Whether two texts have the same value: members may come in any order.
pub fn same(one: &Json, other: &Json) -> bool {
    let value = |json: &Json| serde_json::from_str::<Value>(json.as_str()).ok();
    one == other || value(one).is_some_and(|one| Some(one) == value(other))
}

/// Depth and numbers of well-formed JSON.
fn scan(text: &[u8]) -> Result<(), Unusable> {
    let (mut depth, mut at) = (0, 0);
    while let Some(&byte) = text.get(at) {
        let rest = text.get(at..).unwrap_or_default();
        at += match byte {
            b'"' => string(rest),
            b'[' | b'{' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err(Unusable::Depth);
                }
                1
            }
            b']' | b'}' => {
                depth -= 1;
                1
            }
            b'-' | b'0'..=b'9' => {
                let length =
                    rest.iter().take_while(|byte| matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9'));
                let length = length.count();
                if !std::str::from_utf8(rest.get(..length).unwrap_or_default()).is_ok_and(is_kept) {
                    return Err(Unusable::Number(at));
                }
                length
            }
            _ => 1,
        };
    }
    Ok(())
}

/// Length of the string at the beginning, with its quotes.
fn string(text: &[u8]) -> usize {
    let mut at = 1;
    loop {
        match text.get(at) {
            Some(b'\\') => at += 2,
            Some(b'"') | None => return at + 1,
            Some(_) => at += 1,
        }
    }
}

/// Whether a 64-bit integer or float has all digits of the number.
fn is_kept(number: &str) -> bool {
    if number.parse::<i64>().is_ok() || number.parse::<u64>().is_ok() {
        return true;
    }
    // the shortest digits that are read as the same float (D. Gay 1990; Ryū, U. Adams 2018)
    number.parse::<f64>().is_ok_and(|float| float.is_finite() && decimal(number) == decimal(&format!("{float:e}")))
}

/// Sign, digits without zeros at either end, and exponent of a decimal number.
fn decimal(number: &str) -> Option<(bool, String, i64)> {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let (negative, whole) = whole.strip_prefix('-').map_or((false, whole), |whole| (true, whole));
    let digits = format!("{whole}{fraction}");
    let trimmed = digits.trim_end_matches('0');
    if trimmed.trim_start_matches('0').is_empty() {
        return Some((false, String::new(), 0));
    }
    let dropped = i64::try_from(digits.len() - trimmed.len()).ok()?;
    let exponent =
        exponent.parse::<i64>().ok()?.checked_sub(i64::try_from(fraction.len()).ok()?)?.checked_add(dropped)?;
    Some((negative, trimmed.trim_start_matches('0').to_owned(), exponent))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(text: &str) -> Result<(), Unusable> {
        admit(text.as_bytes()).map(|json| assert_eq!(json.as_str(), text.trim()))
    }

    #[test]
    fn what_everybody_reads_alike_is_accepted() {
        let nested = format!("{}1{}", "[".repeat(100), "]".repeat(100));
        for text in [
            "{}",
            " [1, -2, 0.1, 1e3, 1.50, 100000000000000000000, -0.0, 0e0, 1e-7]",
            r#"{"a": "[\"1e999\\"}"#,
            &nested,
            "18446744073709551615",
            "-9223372036854775808",
            "12345678.90",
            "0.30000000000000004",
            r#""\ud83d\ude00""#,
            "5e-324",
        ] {
            assert_eq!(admitted(text), Ok(()), "{text}");
        }
    }

    #[test]
    fn what_could_not_be_read_again_is_refused() {
        for text in ["", "{", "NaN", r#""\ud83d""#, r#"{"a": "\udc00x"}"#, "1e400", "[1,]", "{} {}", "\u{feff}{}"] {
            assert!(matches!(admitted(text), Err(Unusable::NotJson(_) | Unusable::Number(_))), "{text}");
        }
        for depth in [101, 200, 100_000] {
            let nested = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
            assert!(matches!(admitted(&nested), Err(Unusable::Depth | Unusable::NotJson(_))), "{depth}");
        }
    }

    #[test]
    fn a_number_that_would_change_on_its_way_is_refused() {
        for number in [
            "18446744073709551616",
            "-9223372036854775809",
            "123456789012345678901234567890",
            "12345678901234567.89",
            "0.1000000000000000055511151231257827",
            "9007199254740993.0",
            "1e-400",
        ] {
            assert_eq!(admitted(&format!("[{number}]")), Err(Unusable::Number(1)), "{number}");
        }
        assert_eq!(admitted(r#"{"a": "é", "n": 12345678901234567.89}"#), Err(Unusable::Number(17)));
    }
}
