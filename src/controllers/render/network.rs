//! Building blocks of NetworkPolicies, which admit connections into the pods that Weft makes.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::networking::v1::{
        IPBlock, NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};

use crate::controllers::resources::settings::Settings;

/// Where a connection arrives that a mesh carries: Istio ambient (HBONE) and Linkerd's proxy. What is behind is the mesh's affair.
const MESH_PORTS: [u16; 2] = [15008, 4143];
/// Where Istio ambient has the kubelet's probes come from; without a mesh no policy keeps them out.
/// <https://istio.io/latest/docs/ambient/usage/networkpolicy/>
const AMBIENT_PROBES: [&str; 2] = ["169.254.7.127/32", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128"];

/// Nothing gets in but by `ingress`, or by another policy.
pub fn policy(metadata: ObjectMeta, pods: LabelSelector, ingress: Vec<NetworkPolicyIngressRule>) -> NetworkPolicy {
    NetworkPolicy {
        metadata,
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(pods),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(ingress),
            egress: None,
        }),
    }
}

/// Admits `from` to `port`, directly or through a mesh.
pub fn admit(port: u16, from: Vec<NetworkPolicyPeer>) -> NetworkPolicyIngressRule {
    let ports = std::iter::once(port).chain(MESH_PORTS).map(|port| ports("TCP", port, None));
    NetworkPolicyIngressRule { from: Some(from), ports: Some(ports.collect()) }
}

/// Admits everybody to all ports but `closed`.
pub fn admit_all_but(closed: u16) -> NetworkPolicyIngressRule {
    let around = [
        ports("TCP", 1, Some(closed - 1)),
        ports("TCP", closed + 1, Some(u16::MAX)),
        ports("UDP", 1, Some(u16::MAX)),
        ports("SCTP", 1, Some(u16::MAX)),
    ];
    NetworkPolicyIngressRule { from: None, ports: Some(around.into()) }
}

/// Admits the kubelet's probes under Istio ambient.
pub fn admit_probes() -> NetworkPolicyIngressRule {
    let block = |cidr: &str| NetworkPolicyPeer {
        ip_block: Some(IPBlock { cidr: cidr.to_owned(), except: None }),
        ..NetworkPolicyPeer::default()
    };
    NetworkPolicyIngressRule { from: Some(AMBIENT_PROBES.map(block).into()), ports: None }
}

fn ports(protocol: &str, first: u16, last: Option<u16>) -> NetworkPolicyPort {
    NetworkPolicyPort {
        port: Some(IntOrString::Int(first.into())),
        protocol: Some(protocol.to_owned()),
        end_port: last.map(Into::into),
    }
}

/// Pods of the policy's own namespace that have all these labels.
pub fn pods(labels: BTreeMap<String, String>) -> NetworkPolicyPeer {
    NetworkPolicyPeer { pod_selector: Some(matching(labels)), ..NetworkPolicyPeer::default() }
}

/// The operator's pods.
pub fn operator(settings: &Settings) -> NetworkPolicyPeer {
    let namespace = [("kubernetes.io/metadata.name".to_owned(), settings.namespace.clone())].into();
    NetworkPolicyPeer { namespace_selector: Some(matching(namespace)), ..pods(settings.pod_labels.clone()) }
}

/// Who reads a data-plane program's status and metrics: the operator, and whoever the installation names.
pub fn observers(settings: &Settings) -> Vec<NetworkPolicyPeer> {
    std::iter::once(operator(settings)).chain(settings.metrics_clients.iter().cloned()).collect()
}

fn matching(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: (!labels.is_empty()).then_some(labels), ..LabelSelector::default() }
}
