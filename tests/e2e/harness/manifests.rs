//! The objects that scenarios apply, to be varied by them.

use serde_json::{Value, json};

use super::SERVICE_IMAGE;

/// The tables of the tests' service.
pub const SCHEMA: &str = include_str!("../participant/schema.sql");

/// A service of the tests with a database, and the ConfigMap `NAME-migrations` that it needs.
pub fn microservice(name: &str) -> Value {
    json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "Microservice",
        "metadata": {"name": name},
        "spec": {
            "image": SERVICE_IMAGE,
            "command": ["/usr/bin/weft-e2e"],
            "args": ["serve"],
            "ports": [{"name": "http", "port": 8080, "protocol": "http"}],
            "probes": {"readiness": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 1, "timeoutSeconds": 5}},
            "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}},
            "database": {
                "postgres": {
                    "version": "17",
                    "storage": {"size": "64Mi"},
                    "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}},
                },
                "migrations": {"configMap": format!("{name}-migrations")},
            },
            "commands": {
                "Act": {"http": {"path": "/commands/act"}},
                "Undo": {"http": {"path": "/commands/undo"}},
            },
        },
    })
}

pub fn configmap(name: &str, files: &[(&str, &str)]) -> Value {
    let data: serde_json::Map<String, Value> =
        files.iter().map(|(file, text)| ((*file).to_owned(), Value::from(*text))).collect();
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
}

/// The relay of `service`, named like it, into the broker of the scenario's release.
pub fn relay(service: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "OutboxRelay",
        "metadata": {"name": service},
        "spec": {
            "microservice": service,
            "mode": mode,
            "sink": {"nats": {
                "stream": service,
                "subject": format!("{service}.{{aggregate_type}}.{{type}}"),
            }},
        },
    })
}

/// Three steps of the services `first` and `second`; the last refuses when `input.refuse` says so.
pub fn saga(name: &str, first: &str, second: &str) -> Value {
    let with = json!({"refuse": "input.refuse"});
    let retry = json!({"maxAttempts": 1000, "initialBackoff": "50ms", "maxBackoff": "1s"});
    let step = |name: &str, service: &str| {
        json!({
            "name": name,
            "do": {"service": service, "command": "Act"},
            "undo": {"service": service, "command": "Undo"},
            "timeout": "10s",
            "retry": retry,
        })
    };
    let mut confirm = step("confirm", first);
    confirm["do"]["with"] = with;
    confirm["undo"] = json!({"none": true});
    json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "Saga",
        "metadata": {"name": name},
        "spec": {"deadline": "15m", "steps": [step("reserve", first), step("book", second), confirm]},
    })
}

impl super::Scenario {
    /// Applies a service of the tests with its migration.
    pub async fn apply_service(&self, microservice: &Value) -> anyhow::Result<()> {
        let name = microservice["metadata"]["name"].as_str().unwrap_or_default();
        self.apply(&configmap(&format!("{name}-migrations"), &[("001_tables.sql", SCHEMA)])).await?;
        self.apply(microservice).await?;
        Ok(())
    }
}
