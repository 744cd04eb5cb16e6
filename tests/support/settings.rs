//! The operator's configuration in tests of what it plans.

use std::collections::BTreeMap;

use weft::{
    api::v1alpha1::Storage,
    controllers::resources::settings::{Broker, Resources, Settings},
    nats::accounts::Accounts,
};

pub fn settings() -> Settings {
    Settings {
        image: "weft".to_owned(),
        image_pull_policy: None,
        postgres_image: "postgres:{version}".to_owned(),
        resources: Resources::default(),
        orchestrator_storage: Storage::default(),
        namespace: "weft-system".to_owned(),
        pod_labels: BTreeMap::new(),
        metrics_clients: Vec::new(),
        image_pull_secrets: Vec::new(),
        fixed_user_ids: true,
        broker: Some(Broker {
            url: "nats://weft-nats.weft-system:4222".to_owned(),
            accounts: Accounts::new("a seed".to_owned()),
        }),
        password: || "a".repeat(32),
    }
}
