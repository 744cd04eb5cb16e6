//! What a Microservice's own spec must not have its pods reach: Secrets, volumes and identities of Weft's, or of another
//! Microservice. Whoever may write a Microservice need not be allowed to read the namespace's Secrets.
//!
//! The rule goes by names. What they stand for may be made later, and outlives its owner, so it does not ask what is there.
//! What is dangerous by its kind (`hostPath`, the host's namespaces, privileged containers) is left to Pod Security.

use serde_json::Value;

use crate::{
    controllers::resources::{plan::Rejection, reason::Reason},
    domain::names,
    nats::accounts::FINGERPRINT,
};

/// Prefix of the names of Weft's own containers and volumes in a service's pod.
const OWN_PREFIX: &str = "weft-";
/// Members of a pod spec that refer to a Secret by the member `name` of theirs, or of their elements.
const SECRET_REFERENCES: [&str; 5] =
    ["secret", "secretRef", "secretKeyRef", "nodePublishSecretRef", "imagePullSecrets"];
/// Lists of a pod spec whose elements may be Weft's own, by the prefix of their `name`.
const NAMED: [&str; 4] = ["containers", "initContainers", "volumes", "volumeMounts"];
/// What an overlay may change of a container of Weft's own.
const SETTABLE: [&str; 2] = ["name", "resources"];

/// Refuses what `value`, found at `path` in the spec of Microservice `service`, names of others.
pub fn check(service: &str, path: &str, value: &Value) -> Result<(), Rejection> {
    match find(service, path, "", value) {
        Some(message) => Err(Rejection { reason: Reason::NotItsOwn, message }),
        None => Ok(()),
    }
}

/// Refuses the Secret `name`, given at `path` for Microservice `service`, when it is another's.
pub fn check_secret(service: &str, path: &str, name: &str) -> Result<(), Rejection> {
    if is_foreign_secret(service, name) {
        return Err(Rejection { reason: Reason::NotItsOwn, message: secret(service, path, name) });
    }
    Ok(())
}

/// The sentence about the first thing that is not the service's own; `field` is the last field name of `path`.
fn find(service: &str, path: &str, field: &str, value: &Value) -> Option<String> {
    match value {
        Value::Array(elements) => elements
            .iter()
            .enumerate()
            .find_map(|(index, element)| find(service, &format!("{path}[{index}]"), field, element)),
        Value::Object(members) => {
            let name = members.get("name").and_then(Value::as_str).unwrap_or_default();
            if SECRET_REFERENCES.contains(&field) && is_foreign_secret(service, name) {
                return Some(secret(service, &format!("{path}.name"), name));
            }
            if is_claim_of_a_database(name) && ["dataSource", "dataSourceRef"].contains(&field) {
                return Some(claim(&format!("{path}.name"), name));
            }
            if NAMED.contains(&field) && name.starts_with(OWN_PREFIX) {
                return wefts_own(path, field, name, members.keys());
            }
            members.iter().find_map(|(member, value)| find(service, &format!("{path}.{member}"), member, value))
        }
        Value::String(name) => match field {
            "secretName" if is_foreign_secret(service, name) => Some(secret(service, path, name)),
            "claimName" if is_claim_of_a_database(name) => Some(claim(path, name)),
            "serviceAccountName" | "serviceAccount" if name != service => Some(account(service, path)),
            _ => None,
        },
        Value::Null if ["serviceAccountName", "serviceAccount"].contains(&field) => Some(account(service, path)),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

/// Weft's names for Secrets, but that of the service's own binding.
fn is_foreign_secret(service: &str, name: &str) -> bool {
    let of_a_database = ["-db", "-db-admin", "-db-relay"].iter().any(|end| name.ends_with(end));
    (of_a_database && name != names::database(service)) || is_of_the_broker(name)
}

/// `NAME-broker-HASH`.
fn is_of_the_broker(name: &str) -> bool {
    name.rsplit_once("-broker-").is_some_and(|(_, hash)| {
        hash.len() == FINGERPRINT && hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// `data-NAME-db-0`.
fn is_claim_of_a_database(name: &str) -> bool {
    name.starts_with("data-") && name.ends_with("-db-0")
}

fn secret(service: &str, path: &str, name: &str) -> String {
    format!(
        "{path} names the Secret `{name}`: Secrets that end in `-db`, `-db-admin`, `-db-relay` or `-broker-HASH` are Weft's own, and of these a service gets `{}` alone; leave it out, or use a Secret of another name",
        names::database(service)
    )
}

fn claim(path: &str, name: &str) -> String {
    format!(
        "{path} names `{name}`, the volume of a database, which only its server may mount: leave it out, or use a claim of another name"
    )
}

fn account(service: &str, path: &str) -> String {
    format!(
        "{path} is another one than `{service}`, the service's own: leave it out, and give the rights to the ServiceAccount `{service}`"
    )
}

/// Of Weft's own containers the resources may change; its volumes are mounted in its own containers only.
fn wefts_own<'a>(path: &str, field: &str, name: &str, mut members: impl Iterator<Item = &'a String>) -> Option<String> {
    if field.to_lowercase().ends_with("containers") {
        let changed = members.find(|member| !SETTABLE.contains(&member.as_str()))?;
        return Some(format!(
            "{path}.{changed} changes Weft's own container `{name}`, of which only `resources` may change: leave it out"
        ));
    }
    Some(format!(
        "{path} names `{name}`: volumes that begin with `{OWN_PREFIX}` are Weft's own, and hold passwords; leave it out, or choose another name"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(spec: &Value) -> String {
        check("orders", "spec.podTemplate.spec", spec).expect_err(&spec.to_string()).message
    }

    #[test]
    fn the_field_and_the_remedy_are_named() {
        assert_eq!(
            refused(
                &json!({"volumes": [{"name": "a", "emptyDir": {}}, {"name": "b", "secret": {"secretName": "customers-db-admin"}}]})
            ),
            "spec.podTemplate.spec.volumes[1].secret.secretName names the Secret `customers-db-admin`: Secrets that end in `-db`, `-db-admin`, `-db-relay` or `-broker-HASH` are Weft's own, and of these a service gets `orders-db` alone; leave it out, or use a Secret of another name"
        );
        assert_eq!(
            refused(&json!({"serviceAccountName": "customers"})),
            "spec.podTemplate.spec.serviceAccountName is another one than `orders`, the service's own: leave it out, and give the rights to the ServiceAccount `orders`"
        );
    }

    #[test]
    fn every_way_to_a_secret_of_a_database_is_closed() {
        let in_container = |member: Value| json!({"containers": [{"name": "proxy", "image": "p"}, member]});
        for (spec, path) in [
            (
                json!({"volumes": [{"projected": {"sources": [{"secret": {"name": "orders-db-admin"}}]}}]}),
                "volumes[0].projected.sources[0].secret.name",
            ),
            (
                json!({"volumes": [{"csi": {"driver": "d", "nodePublishSecretRef": {"name": "customers-db"}}}]}),
                "volumes[0].csi.nodePublishSecretRef.name",
            ),
            (
                json!({"volumes": [{"csi": {"driver": "d", "volumeAttributes": {"secretName": "customers-db"}}}]}),
                "volumes[0].csi.volumeAttributes.secretName",
            ),
            (
                json!({"volumes": [{"flexVolume": {"driver": "d", "secretRef": {"name": "customers-db"}}}]}),
                "volumes[0].flexVolume.secretRef.name",
            ),
            (
                json!({"imagePullSecrets": [{"name": "mine"}, {"name": "trip-orchestrator-db"}]}),
                "imagePullSecrets[1].name",
            ),
            (
                in_container(json!({"name": "service", "envFrom": [{"secretRef": {"name": "orders-db-relay"}}]})),
                "containers[1].envFrom[0].secretRef.name",
            ),
            (
                in_container(
                    json!({"name": "x", "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "customers-db-relay", "key": "password"}}}]}),
                ),
                "containers[1].env[0].valueFrom.secretKeyRef.name",
            ),
            (
                json!({"volumes": [{"secret": {"secretName": "orders-broker-0a1b2c3d"}}]}),
                "volumes[0].secret.secretName",
            ),
            (
                json!({"initContainers": [{"name": "x", "envFrom": [{"secretRef": {"name": "customers-db"}}]}]}),
                "initContainers[0].envFrom[0].secretRef.name",
            ),
        ] {
            let message = refused(&spec);
            assert!(message.starts_with(&format!("spec.podTemplate.spec.{path} names the Secret")), "{message}");
        }
    }

    #[test]
    fn neither_are_their_volumes_nor_what_is_wefts_own_in_the_pod() {
        for (spec, start) in [
            (
                json!({"volumes": [{"persistentVolumeClaim": {"claimName": "data-customers-db-0"}}]}),
                "volumes[0].persistentVolumeClaim.claimName names `data-customers-db-0`",
            ),
            (
                json!({"volumes": [{"ephemeral": {"volumeClaimTemplate": {"spec": {"dataSource": {"kind": "PersistentVolumeClaim", "name": "data-customers-db-0"}}}}}]}),
                "volumes[0].ephemeral.volumeClaimTemplate.spec.dataSource.name names",
            ),
            (
                json!({"containers": [{"name": "service", "volumeMounts": [{"name": "weft-relay-role", "mountPath": "/x"}]}]}),
                "containers[0].volumeMounts[0] names `weft-relay-role`",
            ),
            (json!({"volumes": [{"name": "weft-relay-role", "emptyDir": {}}]}), "volumes[0] names `weft-relay-role`"),
            (
                json!({"initContainers": [{"name": "weft-relay", "image": "mine"}]}),
                "initContainers[0].image changes Weft's own container `weft-relay`",
            ),
            (json!({"serviceAccountName": null}), "serviceAccountName is another one"),
            (json!({"serviceAccount": "default"}), "serviceAccount is another one"),
        ] {
            let message = refused(&spec);
            assert!(message.starts_with(&format!("spec.podTemplate.spec.{start}")), "{message}");
        }
    }

    #[test]
    fn what_is_the_services_own_is_not_refused() {
        for spec in [
            json!({"serviceAccountName": "orders", "automountServiceAccountToken": true}),
            json!({"volumes": [{"name": "db", "secret": {"secretName": "orders-db"}}, {"name": "c", "secret": {"secretName": "orders-db-certificate"}}]}),
            json!({"volumes": [{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}]}),
            json!({"volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "data"}}]}),
            json!({"initContainers": [{"name": "weft-relay", "resources": {"limits": {"memory": "1Gi"}}}]}),
            json!({"containers": [{"name": "service", "env": [{"name": "customers-db", "value": "x"}]}]}),
        ] {
            assert_eq!(check("orders", "spec.podTemplate.spec", &spec), Ok(()));
        }
    }
}
