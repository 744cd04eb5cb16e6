//! The JSON Schema (draft 2020-12, or the one that `$schema` names) of a saga's input.
//!
//! What it takes to check an input is bounded: patterns are of a linear engine, and there are no references, as in Kubernetes'
//! structural schemas, so that a schema can neither recurse nor name another document.

use jsonschema::{PatternOptions, Validator, paths::LocationSegment};
use serde_json::Value;

/// Longest schema, in bytes of JSON.
pub const MAX_LENGTH: usize = 16 * 1024;
/// Deepest nesting of its arrays and objects.
const MAX_DEPTH: usize = 32;
/// Largest compiled pattern, in bytes.
const MAX_PATTERN: usize = 256 * 1024;
/// A longer part of the schema is cut in a message.
const MAX_EXCERPT: usize = 120;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    #[error("has {0} bytes of JSON; at most {MAX_LENGTH} are allowed")]
    TooLong(usize),
    #[error("is nested too deeply; at most {MAX_DEPTH} arrays and objects may be within each other")]
    TooDeep,
    #[error("has `{0}`; there are no references, write what it refers to in its place")]
    Reference(String),
    #[error("is not a JSON Schema: {0}")]
    Invalid(String),
}

/// A compiled schema.
#[derive(Debug)]
pub struct Schema {
    schema: Value,
    validator: Validator,
}

impl Schema {
    pub fn compile(schema: &Value) -> Result<Self, SchemaError> {
        let length = schema.to_string().len();
        if length > MAX_LENGTH {
            return Err(SchemaError::TooLong(length));
        }
        check_parts(schema, 0)?;
        let patterns = PatternOptions::regex().size_limit(MAX_PATTERN).dfa_size_limit(MAX_PATTERN);
        let validator = jsonschema::options().with_pattern_options(patterns).build(schema);
        let validator =
            validator.map_err(|error| SchemaError::Invalid(format!("{}: {error}", error.instance_path())))?;
        Ok(Self { schema: schema.clone(), validator })
    }

    /// The error names the place and the rule, both in the words of the schema, and no value.
    pub fn check(&self, input: &Value) -> Result<(), String> {
        let Err(error) = self.validator.validate(input) else { return Ok(()) };
        let mut place = String::new();
        for segment in error.instance_path() {
            match segment {
                // the name of a member that the schema does not declare is the sender's, and may be data
                LocationSegment::Property(name) if !declares(&self.schema, &name) => place.push_str("/*"),
                segment => {
                    place.push('/');
                    place.push_str(&segment.to_string());
                }
            }
        }
        let rule = error.schema_path().as_str();
        let (_, keyword) = rule.rsplit_once('/').unwrap_or(("", rule));
        let wanted = self.schema.pointer(rule).map(excerpt).unwrap_or_default();
        let place = if place.is_empty() { "the input".to_owned() } else { format!("`{place}`") };
        Err(format!("{place} must satisfy `{keyword}: {wanted}` (spec.input{rule})"))
    }
}

fn check_parts(part: &Value, depth: usize) -> Result<(), SchemaError> {
    if depth > MAX_DEPTH {
        return Err(SchemaError::TooDeep);
    }
    match part {
        Value::Array(items) => items.iter().try_for_each(|item| check_parts(item, depth + 1)),
        Value::Object(members) => members.iter().try_for_each(|(name, member)| {
            if ["$ref", "$dynamicRef", "$recursiveRef"].contains(&name.as_str()) {
                return Err(SchemaError::Reference(name.clone()));
            }
            check_parts(member, depth + 1)
        }),
        _ => Ok(()),
    }
}

/// Whether `name` is in some `properties` of the schema.
fn declares(part: &Value, name: &str) -> bool {
    match part {
        Value::Array(items) => items.iter().any(|item| declares(item, name)),
        Value::Object(members) => {
            let here = members.get("properties").and_then(Value::as_object);
            here.is_some_and(|here| here.contains_key(name)) || members.values().any(|member| declares(member, name))
        }
        _ => false,
    }
}

fn excerpt(part: &Value) -> String {
    let text = part.to_string();
    if text.chars().count() <= MAX_EXCERPT {
        return text;
    }
    text.chars().take(MAX_EXCERPT).chain(['…']).collect()
}

/// The first name of `path` (without its root, `input`) that the schema does not know, where it lists what it knows.
pub(super) fn unknown_member<'p>(schema: &Value, path: &'p [String]) -> Option<&'p str> {
    let mut schema = schema;
    for name in path {
        let members = schema.as_object()?;
        let is_open = ["allOf", "anyOf", "oneOf", "if", "patternProperties", "additionalProperties"]
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

    fn order() -> Schema {
        Schema::compile(&json!({
            "type": "object",
            "required": ["orderId", "total"],
            "properties": {
                "orderId": {"type": "string", "minLength": 1, "pattern": "^[a-z]+$"},
                "total": {"type": "integer", "minimum": 1},
                "state": {"enum": ["new", "old"]},
                "lines": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
            },
            "patternProperties": {"^x-": {"type": "string"}},
            "additionalProperties": false,
        }))
        .unwrap()
    }

    #[test]
    fn an_input_that_does_not_fit_is_named_by_place_and_rule() {
        let order = order();
        for (input, message) in [
            (json!([]), r#"the input must satisfy `type: "object"` (spec.input/type)"#),
            (
                json!({"orderId": "a"}),
                r#"the input must satisfy `required: ["orderId","total"]` (spec.input/required)"#,
            ),
            (
                json!({"orderId": "4111", "total": 1}),
                r#"`/orderId` must satisfy `pattern: "^[a-z]+$"` (spec.input/properties/orderId/pattern)"#,
            ),
            (
                json!({"orderId": "a", "total": -4111}),
                "`/total` must satisfy `minimum: 1` (spec.input/properties/total/minimum)",
            ),
            (
                json!({"orderId": "a", "total": 1, "state": "4111"}),
                r#"`/state` must satisfy `enum: ["new","old"]` (spec.input/properties/state/enum)"#,
            ),
            (
                json!({"orderId": "a", "total": 1, "lines": [{"n": 1}, {"n": "4111"}]}),
                r#"`/lines/1/n` must satisfy `type: "integer"` (spec.input/properties/lines/items/properties/n/type)"#,
            ),
            (
                json!({"orderId": "a", "total": 1, "4111": 1}),
                "the input must satisfy `additionalProperties: false` (spec.input/additionalProperties)",
            ),
            (
                json!({"orderId": "a", "total": 1, "x-4111": 1}),
                r#"`/*` must satisfy `type: "string"` (spec.input/patternProperties/^x-/type)"#,
            ),
        ] {
            assert_eq!(order.check(&input), Err(message.to_owned()));
        }
        assert_eq!(order.check(&json!({"orderId": "a", "total": 1, "lines": [], "x-a": ""})), Ok(()));
    }

    #[test]
    fn a_schema_that_is_none_or_unbounded_is_refused() {
        let deep = (0..40).fold(json!({}), |inner, _| json!({"not": inner}));
        for (schema, part) in [
            (json!({"type": "text"}), "is not a JSON Schema: /type"),
            (json!({"properties": {"a": {"minimum": "1"}}}), "is not a JSON Schema: /properties/a/minimum"),
            (json!({"pattern": "("}), "is not a JSON Schema"),
            (json!({"pattern": "(?=a)"}), "is not a JSON Schema"),
            (json!({"pattern": "((a{100}){100}){100}"}), "is not a JSON Schema"),
            (json!({"properties": {"a": {"$ref": "https://example.com/a.json"}}}), "has `$ref`"),
            (json!({"allOf": [{"$ref": "#"}]}), "has `$ref`"),
            (json!({"$dynamicRef": "#"}), "has `$dynamicRef`"),
            (json!({"$schema": "https://example.com/schema"}), "is not a JSON Schema"),
            (json!({"description": "x".repeat(MAX_LENGTH)}), "has 16402 bytes"),
            (deep, "is nested too deeply"),
        ] {
            let error = Schema::compile(&schema).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
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
