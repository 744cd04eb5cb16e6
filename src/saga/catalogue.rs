//! The definitions that instances run: those of the contract, and older versions that still have live instances.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use super::{compiled::Compiled, counts::Counts};
use crate::{
    contract::status::SagaCounts,
    domain::saga::{
        definition::{Call, Definition},
        request::{self, Target},
    },
};

/// A start that has found its definition is counted within this time.
const LAST_START: Duration = Duration::from_secs(1);

/// All definitions known to this process.
#[derive(Debug, Default)]
pub(super) struct Catalogue(RwLock<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// By saga, then by version.
    known: HashMap<String, HashMap<String, Arc<Compiled>>>,
    /// By saga, the version that new instances start with.
    current: BTreeMap<String, Arc<Compiled>>,
    /// Sagas that are being deleted, and since when nothing starts them.
    draining: BTreeMap<String, Instant>,
    counts: BTreeMap<String, Arc<Counts>>,
    /// Where the services of the current definitions are, by service.
    services: HashMap<String, Service>,
}

#[derive(Debug)]
struct Service {
    /// Scheme and authority: `http://HOST:PORT`.
    origin: String,
    /// By command.
    addresses: HashMap<String, Address>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub method: String,
    pub url: String,
}

impl Address {
    pub(super) fn target(&self) -> Target<'_> {
        Target { method: &self.method, url: &self.url }
    }

    /// The method and path of `call`, at this origin.
    pub(super) fn with_path_of(&self, call: &Call) -> Option<Self> {
        let ((origin, _), (_, path)) = (split(&self.url)?, split(&call.url)?);
        Some(Self { method: call.method.clone(), url: format!("{origin}{path}") })
    }
}

impl Catalogue {
    /// The definition that new instances of `saga` start with.
    pub(super) fn current(&self, saga: &str) -> Option<Arc<Compiled>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).current.get(saga).cloned()
    }

    pub(super) fn known(&self, saga: &str, version: &str) -> Option<Arc<Compiled>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).known.get(saga)?.get(version).cloned()
    }

    /// Adds a definition for instances that started with it.
    pub(super) fn insert(&self, definition: Definition) -> Arc<Compiled> {
        let mut inner = self.0.write().unwrap_or_else(PoisonError::into_inner);
        inner.insert(definition)
    }

    /// Where a call of `definition` goes now, if that is elsewhere than the definition says: it may be an older one, and what
    /// an instance does is pinned to its definition, but not where its participants are. A command that no current definition
    /// has, or that wants other arguments now, keeps its method and path, and goes to where its service is.
    pub(super) fn moved(&self, definition: &Definition, call: &Call) -> Option<Address> {
        let inner = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let current = inner.current.get(&definition.name);
        if current.is_some_and(|current| current.definition.version == definition.version) {
            return None;
        }
        let service = inner.services.get(&call.service)?;
        let fitting = |address: &&Address| request::misfit(call, address.target()).is_none();
        let address = service.addresses.get(&call.command).filter(fitting).cloned().or_else(|| {
            let (_, path) = split(&call.url)?;
            Some(Address { method: call.method.clone(), url: format!("{}{path}", service.origin) })
        });
        address.filter(|address| (&address.method, &address.url) != (&call.method, &call.url))
    }

    /// Makes exactly `definitions` current, but for those that drain: of these only the addresses of participants count. Each
    /// must be stored already.
    pub(super) fn publish(&self, definitions: Vec<Definition>, draining: &[String]) {
        let mut inner = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let since = |saga: &String| inner.draining.get(saga).copied().unwrap_or(now);
        inner.draining = draining.iter().map(|saga| (saga.clone(), since(saga))).collect();
        for saga in draining {
            inner.counts_of(saga);
        }
        inner.services.clear();
        for call in definitions.iter().flat_map(Definition::calls) {
            let Some((origin, _)) = split(&call.url) else { continue };
            let new = || Service { origin: origin.to_owned(), addresses: HashMap::new() };
            let service = inner.services.entry(call.service.clone()).or_insert_with(new);
            let address = Address { method: call.method.clone(), url: call.url.clone() };
            service.addresses.insert(call.command.clone(), address);
        }
        let startable = definitions.into_iter().filter(|definition| !draining.contains(&definition.name));
        let current = startable.map(|definition| (definition.name.clone(), inner.insert(definition)));
        inner.current = current.collect();
    }

    pub(super) fn is_draining(&self, saga: &str) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).draining.contains_key(saga)
    }

    /// The counts of every saga that this process knows, by name.
    pub(super) fn counts(&self) -> BTreeMap<String, SagaCounts> {
        let inner = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let count = |(saga, counts): (&String, &Arc<Counts>)| {
            let version = inner.current.get(saga).map(|compiled| compiled.definition.version.clone());
            let draining = inner.draining.get(saga).is_some_and(|since| since.elapsed() >= LAST_START);
            (saga.clone(), SagaCounts { draining, ..counts.snapshot(version.unwrap_or_default()) })
        };
        inner.counts.iter().map(count).collect()
    }

    pub(super) fn counts_of(&self, saga: &str) -> Arc<Counts> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).counts_of(saga)
    }
}

impl Inner {
    fn counts_of(&mut self, saga: &str) -> Arc<Counts> {
        Arc::clone(self.counts.entry(saga.to_owned()).or_default())
    }

    fn insert(&mut self, definition: Definition) -> Arc<Compiled> {
        let counts = self.counts_of(&definition.name);
        let versions = self.known.entry(definition.name.clone()).or_default();
        let compiled =
            versions.entry(definition.version.clone()).or_insert_with(|| Arc::new(Compiled::new(definition, counts)));
        Arc::clone(compiled)
    }
}

/// Origin and path of an absolute URL.
fn split(url: &str) -> Option<(&str, &str)> {
    let authority = url.find("://")? + 3;
    let path = url.get(authority..)?.find('/').map_or(url.len(), |path| authority + path);
    url.split_at_checked(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(service: &str, command: &str, url: &str) -> Call {
        Call {
            service: service.to_owned(),
            command: command.to_owned(),
            method: "POST".to_owned(),
            url: url.to_owned(),
            ..Call::default()
        }
    }

    fn definition(name: &str, calls: &[Call]) -> Definition {
        use crate::domain::saga::definition::{Step, Task, Transaction};
        let step = |call: &Call| Step {
            name: call.command.clone(),
            task: Task::call(Transaction { action: call.clone(), timeout_ms: 1, ..Transaction::default() }),
            ..Step::default()
        };
        let steps = calls.iter().map(step).collect();
        Definition { name: name.to_owned(), deadline_ms: 1, steps, ..Definition::default() }.seal()
    }

    #[test]
    fn an_older_definition_calls_where_its_participants_are_now() {
        let (reserve, ship) =
            (call("stock", "reserve", "http://stock:80/r"), call("stock", "ship", "http://stock:80/s"));
        let charge = call("bank", "charge", "http://bank:80/c");
        let older = definition("order", &[reserve.clone(), ship.clone(), charge.clone()]);
        let moved = call("stock", "reserve", "http://stock:8080/v2/reserve");
        let newer = definition("order", std::slice::from_ref(&moved));
        let catalogue = Catalogue::default();
        catalogue.publish(vec![older.clone()], &[]);
        assert_eq!(catalogue.moved(&older, &reserve), None);
        catalogue.publish(vec![newer.clone()], &[]);
        let url = |definition: &Definition, call: &Call| catalogue.moved(definition, call).map(|address| address.url);
        assert_eq!(url(&older, &reserve).as_deref(), Some("http://stock:8080/v2/reserve"));
        // the newer one does not have this command: its path, where the service is
        assert_eq!(url(&older, &ship).as_deref(), Some("http://stock:8080/s"));
        // nobody knows better
        assert_eq!(url(&older, &charge), None);
        // its path names an argument that the older definition does not give
        catalogue.publish(vec![definition("order", &[call("stock", "ship", "http://stock:8080/{id}/s")])], &[]);
        assert_eq!(url(&older, &ship).as_deref(), Some("http://stock:8080/s"));
        catalogue.publish(vec![newer.clone()], &[]);
        assert_eq!(url(&newer, &moved), None);
        // the saga is deleted, another one calls the service
        catalogue.publish(vec![definition("other", &[call("bank", "refund", "http://bank:9090/refund")])], &[]);
        assert_eq!(url(&older, &charge).as_deref(), Some("http://bank:9090/c"));
    }

    #[test]
    fn a_saga_that_is_being_deleted_starts_nothing_and_still_knows_where_its_participants_are() {
        let reserve = call("stock", "reserve", "http://stock:80/r");
        let older = definition("order", std::slice::from_ref(&reserve));
        let moved = definition("order", &[call("stock", "reserve", "http://stock:8080/r")]);
        let catalogue = Catalogue::default();
        catalogue.publish(vec![older.clone()], &[]);
        assert!(catalogue.current("order").is_some() && !catalogue.is_draining("order"));
        catalogue.publish(vec![moved], &["order".to_owned(), "forgotten".to_owned()]);
        assert!(catalogue.current("order").is_none() && catalogue.is_draining("order"));
        let address = catalogue.moved(&older, &reserve).map(|address| address.url);
        assert_eq!(address.as_deref(), Some("http://stock:8080/r"));
        let counts = catalogue.counts();
        assert_eq!(counts["forgotten"].running, 0, "no instance of it is known");
        assert!(!counts["order"].draining, "a start may be in progress");
        let long_ago = Instant::now().checked_sub(LAST_START).unwrap();
        catalogue.0.write().unwrap().draining.insert("order".to_owned(), long_ago);
        catalogue.publish(vec![older.clone()], &["order".to_owned()]);
        assert!(catalogue.counts()["order"].draining);
        catalogue.publish(vec![older], &[]);
        assert!(catalogue.current("order").is_some() && !catalogue.counts()["order"].draining);
    }

    #[test]
    fn an_url_has_an_origin_and_a_path() {
        assert_eq!(split("http://a:80/b/c"), Some(("http://a:80", "/b/c")));
        assert_eq!(split("http://a"), Some(("http://a", "")));
        assert_eq!(split("a/b"), None);
    }
}
