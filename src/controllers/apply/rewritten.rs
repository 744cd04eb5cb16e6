//! What admission made of a write: the fields that the API server answers otherwise than they were sent.
//!
//! Managed fields do not show it: what a policy or a webhook changes counts as the writer's own.

use std::collections::BTreeSet;

use serde_json::Value;

/// Fields of `sent` that `answered` has otherwise, or not at all: `spec.template.spec.containers[service].image`.
pub fn rewritten(sent: &Value, answered: &Value) -> BTreeSet<String> {
    let mut fields = BTreeSet::new();
    collect(sent, Some(answered), "", &mut fields);
    fields
}

fn collect(sent: &Value, answered: Option<&Value>, path: &str, fields: &mut BTreeSet<String>) {
    match (sent, answered) {
        (Value::Object(members), Some(Value::Object(theirs))) => {
            for (name, member) in members {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                collect(member, theirs.get(name), &path, fields);
            }
        }
        (Value::Array(elements), Some(Value::Array(theirs))) => {
            for (index, element) in elements.iter().enumerate() {
                if let Some(name) = element.get("name").and_then(Value::as_str) {
                    let namesake = theirs.iter().find(|their| their.get("name").is_some_and(|their| their == name));
                    collect(element, namesake, &format!("{path}[{name}]"), fields);
                } else if !theirs.iter().any(|their| rewritten(element, their).is_empty()) {
                    fields.insert(format!("{path}[{index}]"));
                }
            }
        }
        // the API server leaves out what is empty
        (sent, None) if is_empty(sent) => {}
        (sent, Some(answered)) if sent == answered || is_same_quantity(sent, answered) => {}
        _ => drop(fields.insert(path.to_owned())),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(elements) => elements.iter().all(is_empty),
        Value::Object(members) => members.values().all(is_empty),
    }
}

/// The API server writes `0.5` as `500m`, and `1024Mi` as `1Gi`.
fn is_same_quantity(one: &Value, other: &Value) -> bool {
    let amount = |value: &Value| match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => amount(text),
        _ => None,
    };
    match (amount(one), amount(other)) {
        (Some(one), Some(other)) => (one - other).abs() <= one.abs() * 1e-9,
        _ => false,
    }
}

/// <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>
fn amount(text: &str) -> Option<f64> {
    let end = text.find(|c: char| !matches!(c, '0'..='9' | '.' | '-' | '+')).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit {
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024_f64.powi(2),
        "Gi" => 1024_f64.powi(3),
        "Ti" => 1024_f64.powi(4),
        "Pi" => 1024_f64.powi(5),
        "Ei" => 1024_f64.powi(6),
        // 1e3
        _ => return text.parse().ok(),
    };
    Some(number.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn deployment(image: &str) -> Value {
        json!({"metadata": {"labels": {"a": "b"}}, "spec": {"replicas": 2, "template": {"spec": {"containers": [
            {"name": "service", "image": image, "env": [{"name": "EMPTY", "value": ""}], "resources": {"limits": {"cpu": "0.5", "memory": "1024Mi"}}},
        ], "tolerations": [{"key": "spot", "operator": "Exists"}]}}}})
    }

    /// As the API server has it: with defaults, additions, and its own notation.
    fn answer(image: &str) -> Value {
        json!({"metadata": {"labels": {"a": "b", "team": "shop"}, "uid": "1"}, "spec": {"replicas": 2, "template": {"spec": {"containers": [
            {"name": "injected", "image": "proxy"},
            {"name": "service", "image": image, "env": [{"name": "EMPTY"}], "resources": {"limits": {"cpu": "500m", "memory": "1Gi"}}},
        ], "tolerations": [{"key": "first"}, {"key": "spot", "operator": "Exists"}]}}}})
    }

    #[test]
    fn defaults_additions_and_another_notation_rewrite_nothing() {
        assert_eq!(rewritten(&deployment("orders:1"), &answer("orders:1")), BTreeSet::new());
    }

    #[test]
    fn a_field_with_another_value_or_none_is_named() {
        let named = rewritten(&deployment("orders:1"), &answer("mirror/orders:1"));
        assert_eq!(named, ["spec.template.spec.containers[service].image".to_owned()].into());
        let mut lacking = answer("orders:1");
        lacking["spec"].as_object_mut().unwrap().remove("replicas");
        lacking["spec"]["template"]["spec"]["tolerations"] = json!([]);
        let named = rewritten(&deployment("orders:1"), &lacking);
        let expected = ["spec.replicas", "spec.template.spec.tolerations[0]"].map(str::to_owned);
        assert_eq!(named, expected.into());
    }

    #[test]
    fn quantities_are_compared_by_their_amount() {
        for (one, other) in [("1e3", "1k"), ("0.1", "100m"), ("1Gi", "1024Mi"), ("1500m", "1.5")] {
            assert!(is_same_quantity(&json!(one), &json!(other)), "{one} {other}");
        }
        assert!(is_same_quantity(&json!(0.1), &json!("100m")));
        for (one, other) in [("1", "2"), ("1M", "1Mi"), ("orders", "stock"), ("", "0")] {
            assert!(!is_same_quantity(&json!(one), &json!(other)), "{one} {other}");
        }
    }
}
