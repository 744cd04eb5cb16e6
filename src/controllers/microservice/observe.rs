//! What is there of a Microservice: from the world, and the migrations' content by one request when it changed.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use sha2::{Digest, Sha256};

use super::Observed;
use crate::{
    api::v1alpha1::Microservice,
    controllers::{
        failure::{RequestError, within_deadline},
        key::{Key, ObjectId, ObjectKind},
        observed::{DatabaseObserved, Migrations},
        plan::ChildKind,
        runtime::Shared,
        world::World,
    },
    domain::names,
};

/// Everything that a plan and a status depend on.
pub async fn observe(shared: &Shared, id: &ObjectId, object: &Microservice) -> Result<Observed, RequestError> {
    let migrations = match object.spec.database.as_ref().and_then(|database| database.migrations.as_ref()) {
        Some(wanted) => {
            let id = ObjectId::new(&id.namespace, &wanted.config_map);
            let version = shared.world().config_map(&id);
            Some(shared.migrations.get(&shared.client, id, version).await?)
        }
        None => None,
    };
    Ok(look(&shared.world(), id, object, migrations))
}

/// As [`observe`], when the migrations are known.
pub fn look(world: &World, id: &ObjectId, object: &Microservice, migrations: Option<Migrations>) -> Observed {
    let key = Key::of(ObjectKind::Microservice, id);
    let dependencies = object.spec.depends_on.iter().filter_map(|dependency| {
        let service = world.get::<Microservice>(&ObjectId::new(&id.namespace, &dependency.service))?;
        Some((dependency.service.clone(), service))
    });
    Observed {
        deployment: world.workload(&key, ChildKind::Deployment, &id.name),
        database: DatabaseObserved {
            server: world.workload(&key, ChildKind::StatefulSet, &names::database(&id.name)),
            jobs: world.jobs(&key),
            migrations,
        },
        dependencies: dependencies.collect(),
        relays: world.relays_of(id),
    }
}

/// The migrations' ConfigMaps, each read once per `resourceVersion`.
#[derive(Debug, Default)]
pub struct MigrationsCache(Mutex<HashMap<ObjectId, (u64, Migrations)>>);

impl MigrationsCache {
    /// `version` is what the watch says; `None`: there is no such ConfigMap.
    async fn get(&self, client: &Client, id: ObjectId, version: Option<u64>) -> Result<Migrations, RequestError> {
        let Some(version) = version else { return Ok(Migrations::Missing) };
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        if let Some((known, migrations)) = known
            && known == version
        {
            return Ok(migrations);
        }
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), &id.namespace);
        let Some(config_map) = within_deadline(api.get_opt(&id.name)).await? else { return Ok(Migrations::Missing) };
        let migrations = digest(&config_map);
        let read = super::super::live::version(&config_map.metadata);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id, (read, migrations.clone()));
        Ok(migrations)
    }
}

fn digest(config_map: &ConfigMap) -> Migrations {
    let mut hasher = Sha256::new();
    let mut keys = Vec::new();
    for (key, content) in config_map.data.iter().flatten() {
        keys.push(key.clone());
        for part in [key, content] {
            hasher.update(part.len().to_be_bytes());
            hasher.update(part.as_bytes());
        }
    }
    Migrations::Found { hash: format!("{:x}", hasher.finalize()), keys }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)]) -> Migrations {
        let data = files.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect();
        digest(&ConfigMap { data: Some(data), ..ConfigMap::default() })
    }

    #[test]
    fn the_hash_moves_with_names_and_contents() {
        let first = of(&[("0001.sql", "create table a()")]);
        assert_eq!(first, of(&[("0001.sql", "create table a()")]));
        assert_ne!(first, of(&[("0001.sql", "create table b()")]));
        assert_ne!(of(&[("a", "bc")]), of(&[("ab", "c")]));
    }
}
