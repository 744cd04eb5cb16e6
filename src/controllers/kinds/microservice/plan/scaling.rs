//! How many pods of a service run: a number, or between two as an autoscaler finds.

use k8s_openapi::api::{
    autoscaling::v2::{
        ContainerResourceMetricSource, CrossVersionObjectReference, HorizontalPodAutoscaler,
        HorizontalPodAutoscalerSpec, MetricSpec, MetricTarget,
    },
    policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::deployment::CONTAINER;
use crate::{
    api::v1alpha1::{Autoscaling, Microservice},
    controllers::{
        render::owner::Owner,
        resources::{labels::Component, observed::Workload},
    },
};

/// `spec.replicas` of the Deployment; `None` once an autoscaler has set it, and then nobody else writes it.
///
/// Until then it is the live number: a field that its only owner leaves out falls back to one pod.
pub fn replicas(object: &Microservice, live: Option<&Workload>) -> Option<i32> {
    match (&object.spec.autoscaling, live) {
        (None, _) => Some(object.spec.replicas),
        // an autoscaler does nothing at none
        (Some(_), Some(live)) if live.scaled_by_others && live.wanted > 0 => None,
        (Some(Autoscaling { min, max, .. }), live) => Some(live.map_or(*min, |live| live.wanted).min(*max).max(*min)),
    }
}

/// `NAME`, when `spec.autoscaling` is there.
pub fn autoscaler(object: &Microservice, owner: &Owner) -> Option<HorizontalPodAutoscaler> {
    let Autoscaling { min, max, cpu, metrics } = object.spec.autoscaling.as_ref()?;
    Some(HorizontalPodAutoscaler {
        metadata: owner.metadata(owner.name.clone(), Component::Service),
        spec: Some(HorizontalPodAutoscalerSpec {
            scale_target_ref: CrossVersionObjectReference {
                api_version: Some("apps/v1".to_owned()),
                kind: "Deployment".to_owned(),
                name: owner.name.clone(),
            },
            min_replicas: Some(*min),
            max_replicas: *max,
            metrics: Some(cpu.map(cpu_of_the_service).into_iter().chain(metrics.iter().cloned()).collect()),
            behavior: None,
        }),
        status: None,
    })
}

/// Of the service's container alone: one of a sidecar's would count too, and every container would need a request.
fn cpu_of_the_service(percent: i32) -> MetricSpec {
    MetricSpec {
        type_: "ContainerResource".to_owned(),
        container_resource: Some(ContainerResourceMetricSource {
            container: CONTAINER.to_owned(),
            name: "cpu".to_owned(),
            target: MetricTarget {
                type_: "Utilization".to_owned(),
                average_utilization: Some(percent),
                ..MetricTarget::default()
            },
        }),
        ..MetricSpec::default()
    }
}

/// `NAME`, when there is always more than one pod: with one it would only stand in a drain's way.
pub fn disruption_budget(object: &Microservice, owner: &Owner) -> Option<PodDisruptionBudget> {
    let fewest = object.spec.autoscaling.as_ref().map_or(object.spec.replicas, |scaling| scaling.min);
    (fewest > 1).then(|| PodDisruptionBudget {
        metadata: owner.metadata(owner.name.clone(), Component::Service),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(owner.pods(Component::Service)),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::fixtures::{microservice, ready};

    #[test]
    fn nobody_writes_the_number_of_pods_once_the_autoscaler_has() {
        let object = microservice("orders", "{image: i, replicas: 9, autoscaling: {min: 2, max: 5, cpu: 70}}");
        assert_eq!(replicas(&object, None), Some(2), "a new one begins with the fewest");
        assert_eq!(replicas(&object, Some(&ready(4))), Some(4), "what runs is not scaled down to one");
        assert_eq!(replicas(&object, Some(&ready(9))), Some(5));
        let scaled = Workload { scaled_by_others: true, ..ready(4) };
        assert_eq!(replicas(&object, Some(&scaled)), None);
        assert_eq!(
            replicas(&object, Some(&Workload { wanted: 0, ..scaled.clone() })),
            Some(2),
            "scaled to none by hand"
        );
        let fixed = microservice("orders", "{image: i, replicas: 3}");
        assert_eq!(replicas(&fixed, Some(&scaled)), Some(3));
    }
}
