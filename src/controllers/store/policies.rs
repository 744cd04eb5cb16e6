//! Which pods other people's NetworkPolicies isolate: they then get what a policy admits, and nothing else.

use std::collections::{BTreeMap, HashSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector, SelectorExt};

use super::{Requeue, Scope, Store, live::LiveSpec};
use crate::controllers::resources::key::{Key, ObjectId, ObjectKind};

/// A NetworkPolicy that is not Weft's, and is about connections into the pods that it selects.
#[derive(Clone, Debug, PartialEq)]
pub struct ForeignPolicy(LabelSelector);

impl ForeignPolicy {
    /// `None`: it is about connections out of pods only, or does not have the form.
    pub fn of(spec: &LiveSpec) -> Option<Self> {
        let selector = serde_json::from_value(spec.pod_selector.clone()?).ok()?;
        spec.policy_types.iter().any(|type_| type_ == "Ingress").then_some(Self(selector))
    }

    fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        Selector::try_from(self.0.clone()).is_ok_and(|selector| selector.matches(labels))
    }
}

impl Store {
    /// `None`: it isolates nobody.
    pub fn set_policy(&mut self, id: ObjectId, policy: Option<ForeignPolicy>) -> Requeue {
        let Some(policy) = policy else { return self.remove_policy(&id) };
        if self.policies.insert(id.clone(), policy.clone()) == Some(policy) {
            return Requeue::default();
        }
        self.microservices_in(&id.namespace)
    }

    pub fn remove_policy(&mut self, id: &ObjectId) -> Requeue {
        match self.policies.remove(id) {
            Some(_) => self.microservices_in(&id.namespace),
            None => Requeue::default(),
        }
    }

    /// After a re-list: forgets the policies of `scope` that are not in `seen`.
    pub fn retain_policies(&mut self, scope: &Scope, seen: &HashSet<ObjectId>) -> Requeue {
        let gone: Vec<_> = self.policies.keys().filter(|id| scope.holds(id) && !seen.contains(id)).cloned().collect();
        gone.iter().map(|id| self.remove_policy(id)).collect()
    }

    /// Somebody's policy lets in what it names, and nothing else, where pods have these labels.
    pub fn isolates(&self, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
        let policies = self.policies.range(ObjectId::new(namespace, "")..);
        policies.take_while(|(id, _)| id.namespace == namespace).any(|(_, policy)| policy.selects(labels))
    }

    fn microservices_in(&self, namespace: &str) -> Requeue {
        let services = self.microservices.keys().filter(|id| id.namespace == namespace);
        Requeue::now(services.map(|id| Key::of(ObjectKind::Microservice, id)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::controllers::fixtures::microservice;

    fn policy(spec: serde_json::Value) -> Option<ForeignPolicy> {
        ForeignPolicy::of(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn pods_are_isolated_by_what_selects_them_in_their_namespace() {
        let mut store = Store::default();
        store.set(microservice("orders", "{image: i}"));
        let pods: BTreeMap<_, _> = [("weft.dev/owner".to_owned(), "orders".to_owned())].into();
        let deny = ObjectId::new("shop", "default-deny");

        let other = json!({"podSelector": {"matchLabels": {"app": "redis"}}, "policyTypes": ["Ingress"]});
        store.set_policy(ObjectId::new("shop", "redis"), policy(other));
        let out = json!({"podSelector": {}, "policyTypes": ["Egress"]});
        store.set_policy(ObjectId::new("shop", "out"), policy(out));
        assert!(!store.isolates("shop", &pods));

        let all = policy(json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
        let requeued = store.set_policy(deny.clone(), all.clone());
        assert_eq!(requeued.now, [Key::new(ObjectKind::Microservice, "shop", "orders")]);
        assert!(store.isolates("shop", &pods) && !store.isolates("other", &pods));
        assert_eq!(store.set_policy(deny.clone(), all).now, []);

        assert_eq!(store.remove_policy(&deny).now.len(), 1);
        assert!(!store.isolates("shop", &pods));
    }
}
