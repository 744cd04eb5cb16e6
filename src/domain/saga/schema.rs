//! The JSON Schema of a saga's input.

use std::fmt;

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

/// A longer schema, as JSON, is refused: it is part of every definition.
pub const MAX_LENGTH: usize = 64 * 1024;

/// A compiled schema. Patterns have no look-around and no back-references, so they are matched in linear time.
pub struct Schema(Validator);

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Schema")
    }
}

impl Schema {
    /// The error is a clause: what is wrong with the schema, and where in it.
    pub fn compile(schema: &Value) -> Result<Self, String> {
        let length = schema.to_string().len();
        if length > MAX_LENGTH {
            return Err(format!("has {length} bytes as JSON; at most {MAX_LENGTH} are allowed"));
        }
        if let Some(reference) = remote_reference(schema) {
            return Err(format!("refers to `{reference}`, and nothing is fetched: put it under `$defs`"));
        }
        let options = jsonschema::options().with_pattern_options(PatternOptions::regex());
        let validator = options.build(schema).map_err(|error| {
            let place = error.instance_path().to_string();
            let at = if place.is_empty() { String::new() } else { format!(" at {place}") };
            format!("is no JSON Schema{at}: {}", error.masked())
        })?;
        Ok(Self(validator))
    }

    /// What does not fit in `input`, and where: a clause with names of members and no other value.
    pub fn check(&self, input: &Value) -> Result<(), String> {
        let Err(error) = self.0.validate(input) else { return Ok(()) };
        let place = error.instance_path().to_string();
        let place = if place.is_empty() { "the input itself".to_owned() } else { format!("{place} of the input") };
        Err(format!("{place} does not fit spec.input: {}", error.masked()))
    }
}

/// A `$ref` that leads out of the schema.
fn remote_reference(schema: &Value) -> Option<&str> {
    match schema {
        Value::Object(members) => members.iter().find_map(|(name, value)| match (name.as_str(), value) {
            ("$ref" | "$dynamicRef", Value::String(reference)) if !reference.starts_with('#') => {
                Some(reference.as_str())
            }
            (_, value) => remote_reference(value),
        }),
        Value::Array(items) => items.iter().find_map(remote_reference),
        _ => None,
    }
}

/// The first name of `path` (without its root, `input`) that the schema does not know, where it lists what it knows.
pub(super) fn unknown_member<'p>(schema: &Value, path: &'p [String]) -> Option<&'p str> {
    let mut schema = schema;
    for name in path {
        let members = schema.as_object()?;
        let is_open = ["$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "additionalProperties"]
            .iter()
            .any(|keyword| members.get(*keyword).is_some_and(|value| *value != Value::Bool(false)));
        let properties = members.get("properties")?.as_object()?;
        match properties.get(name) {
            Some(member) => schema = member,
            None if is_open => return None,
            None => return Some(name),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_input_fits_its_schema_or_the_place_is_named_without_its_value() {
        let schema = Schema::compile(&json!({
            "type": "object",
            "required": ["orderId", "total"],
            "properties": {
                "orderId": {"type": "string", "minLength": 1},
                "total": {"type": "integer", "minimum": 1},
                "customer": {"type": "object", "properties": {"id": {"type": "string", "pattern": "^c-[0-9]+$"}}},
            },
        }))
        .unwrap();
        assert_eq!(schema.check(&json!({"orderId": "o", "total": 3})), Ok(()));
        for (input, wanted) in [
            (json!({}), "the input itself does not fit spec.input: \"orderId\" is a required property"),
            (json!([]), "the input itself does not fit spec.input: value is not of type \"object\""),
            (
                json!({"orderId": "o", "total": "hunter2"}),
                "/total of the input does not fit spec.input: value is not of",
            ),
            (json!({"orderId": "o", "total": 3, "customer": {"id": "hunter2"}}), "/customer/id of the input"),
        ] {
            let why = schema.check(&input).unwrap_err();
            assert!(why.starts_with(wanted) && !why.contains("hunter2"), "{why}");
        }
    }

    #[test]
    fn what_is_no_schema_is_refused() {
        for (schema, wanted) in [
            (json!({"type": "objekt"}), "is no JSON Schema at /type"),
            (json!({"properties": {"a": {"minimum": "1"}}}), "is no JSON Schema at /properties/a/minimum"),
            (json!({"pattern": "(a"}), "is no JSON Schema"),
            (json!({"pattern": "(?=a)"}), "is no JSON Schema"),
            (
                json!({"properties": {"a": {"$ref": "https://example.org/a.json"}}}),
                "refers to `https://example.org/a.json`",
            ),
            (json!({"$ref": "#/$defs/absent"}), ""),
            (json!({"description": "x".repeat(MAX_LENGTH)}), "has "),
        ] {
            let why = Schema::compile(&schema).unwrap_err();
            assert!(why.starts_with(wanted), "{schema}: {why}");
        }
        assert!(Schema::compile(&json!({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}})).is_ok());
    }

    #[test]
    fn a_member_that_the_schema_does_not_list_is_found() {
        let schema = json!({"properties": {
            "a": {"properties": {"b": {}}},
            "open": {"properties": {}, "additionalProperties": true},
            "any": {"type": "object"},
        }});
        let unknown = |path: &str| {
            let path: Vec<String> = path.split('.').map(str::to_owned).collect();
            unknown_member(&schema, &path).map(str::to_owned)
        };
        for known in ["a", "a.b", "a.b.c", "open.x", "any.x.y"] {
            assert_eq!(unknown(known), None, "{known}");
        }
        for (path, name) in [("x", "x"), ("a.x", "x"), ("A", "A")] {
            assert_eq!(unknown(path).as_deref(), Some(name));
        }
    }
}
