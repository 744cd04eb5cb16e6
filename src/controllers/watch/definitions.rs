//! Waits until the API server serves Weft's kinds, with every field that this operator knows: the operator may be installed
//! before its definitions, or upgraded before them.

use std::time::Duration;

use kube::Client;
use serde_json::Value;

use crate::{
    api::v1alpha1::{GROUP, VERSION},
    controllers::request::within_deadline,
    crds,
};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Resolves once all kinds are served; until then reports to `waiting` what is missing.
pub async fn wait(client: &Client, waiting: impl Fn(Option<String>)) {
    let (mut pause, mut reported) = (FIRST_PAUSE, None);
    loop {
        let missing = missing(client).await;
        if missing != reported {
            if let Some(missing) = &missing {
                tracing::warn!(missing, "waiting");
            } else {
                tracing::info!("all definitions are served");
            }
            waiting(missing.clone());
            reported.clone_from(&missing);
        }
        if missing.is_none() {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// A sentence about what is missing.
async fn missing(client: &Client) -> Option<String> {
    let wanted: Vec<_> = crds::all().into_iter().map(|crd| crd.spec.names.plural).collect();
    let group_version = format!("{GROUP}/{VERSION}");
    let served = match within_deadline(client.list_api_group_resources(&group_version)).await {
        Ok(served) => served.resources.into_iter().map(|resource| resource.name).collect(),
        Err(error) if error.code() == Some(404) => Vec::new(),
        Err(error) => return Some(format!("the API server does not list what it serves: {}", error.message())),
    };
    match not_installed(wanted.into_iter().filter(|plural| !served.contains(plural)).map(|plural| name(&plural))) {
        Some(missing) => Some(missing),
        None => outdated(client, &group_version).await,
    }
}

/// A sentence about definitions that lack a field of this operator's: the API server would prune it silently. A server that
/// does not publish its schemas is taken at its word.
async fn outdated(client: &Client, group_version: &str) -> Option<String> {
    let path = format!("/openapi/v3/apis/{group_version}");
    let request = axum::http::Request::get(path).body(Vec::new()).ok()?;
    let served: Value = match within_deadline(client.request(request)).await {
        Ok(served) => served,
        Err(error) => {
            tracing::warn!(
                error = error.message(),
                "the API server does not publish its schemas: whether the custom resource definitions are of this version is not checked"
            );
            return None;
        }
    };
    let schemas = served.pointer("/components/schemas")?.as_object()?;
    crds::all().into_iter().find_map(|crd| {
        let kind = &crd.spec.names.kind;
        let known = schemas.values().find(|schema| {
            schema.pointer("/x-kubernetes-group-version-kind/0/kind").and_then(Value::as_str) == Some(kind)
        })?;
        let ours = crd.spec.versions.first()?.schema.as_ref()?.open_api_v3_schema.as_ref()?;
        let lacking = lacking(&serde_json::to_value(ours).ok()?, known)?;
        Some(format!(
            "the custom resource definition {} is older than this operator and does not have {lacking}: upgrade the chart weft-crds",
            name(&crd.spec.names.plural)
        ))
    })
}

/// The path of the first property of `ours` that `theirs` does not have.
fn lacking(ours: &Value, theirs: &Value) -> Option<String> {
    let join = |name: &str, rest: String| if rest.is_empty() { name.to_owned() } else { format!("{name}.{rest}") };
    let properties = ours.get("properties").and_then(Value::as_object).into_iter().flatten();
    let of_properties = properties.filter(|(name, _)| *name != "metadata").find_map(|(name, ours)| {
        match theirs.get("properties").and_then(|properties| properties.get(name)) {
            None => Some(name.clone()),
            Some(theirs) => lacking(ours, theirs).map(|rest| join(name, rest)),
        }
    });
    of_properties.or_else(|| {
        ["items", "additionalProperties"].into_iter().find_map(|member| {
            let (ours, theirs) = (ours.get(member)?, theirs.get(member)?);
            lacking(ours, theirs)
        })
    })
}

/// The name of the definition of `plural`.
pub fn name(plural: &str) -> String {
    format!("{plural}.{GROUP}")
}

/// The sentence about definitions that the API server does not serve; `None` when there are none.
pub fn not_installed(missing: impl IntoIterator<Item: Into<String>>) -> Option<String> {
    let missing: Vec<String> = missing.into_iter().map(Into::into).collect();
    (!missing.is_empty()).then(|| {
        format!(
            "the custom resource definition {} in version {VERSION} is not installed: install the chart weft-crds",
            missing.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_field_that_an_older_definition_lacks_is_named() {
        let ours = serde_json::to_value(crds::all()).unwrap();
        let ours = &ours[0]["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        assert_eq!(lacking(ours, ours), None);
        let mut older = ours.clone();
        let spec = older.pointer_mut("/properties/spec/properties/ports/items/properties").unwrap();
        spec.as_object_mut().unwrap().remove("protocol");
        assert_eq!(lacking(ours, &older).as_deref(), Some("spec.ports.protocol"));
        assert_eq!(
            lacking(&json!({"properties": {"metadata": {"properties": {"x": {}}}}}), &json!({"properties": {}})),
            None
        );
    }
}
