//! Content hashes of other people's ConfigMaps, each read once per `resourceVersion`.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use sha2::{Digest, Sha256};

use crate::controllers::{
    request::{RequestError, within_deadline},
    resources::{key::ObjectId, observed::Migrations},
    store::live::version,
};

#[derive(Debug, Default)]
pub struct ConfigMaps(Mutex<HashMap<ObjectId, (u64, Migrations)>>);

impl ConfigMaps {
    /// `watched` is the version that the watch knows; `None`: there is no such ConfigMap.
    pub async fn get(&self, client: &Client, id: ObjectId, watched: Option<u64>) -> Result<Migrations, RequestError> {
        let Some(watched) = watched else { return Ok(Migrations::Missing) };
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        if let Some((known, migrations)) = known
            && known == watched
        {
            return Ok(migrations);
        }
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), &id.namespace);
        let Some(config_map) = within_deadline(api.get_opt(&id.name)).await? else { return Ok(Migrations::Missing) };
        let migrations = digest(&config_map);
        let read = version(&config_map.metadata);
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
