//! What a Microservice asks of, and leaves to, what is beside it in its namespace.

use super::*;

#[test]
fn neither_the_overlay_nor_the_variables_reach_what_is_another_services() {
    let volume = json!([{"name": "theirs", "secret": {"secretName": "customers-db-admin"}}]);
    let variable = json!({"name": "A", "valueFrom": {"secretKeyRef": {"name": "orders-db-admin", "key": "password"}}});
    let all = json!({"secretRef": {"name": "customers-db"}});
    let cases = [
        (json!({"podTemplate": {"spec": {"volumes": volume}}}), "spec.podTemplate.spec.volumes[0].secret.secretName "),
        (
            json!({"podTemplate": {"spec": {"serviceAccountName": "customers"}}}),
            "spec.podTemplate.spec.serviceAccountName ",
        ),
        (json!({"env": [variable]}), "spec.env[0].valueFrom.secretKeyRef.name "),
        (json!({"envFrom": [all]}), "spec.envFrom[0].secretRef.name "),
    ];
    for (mut spec, field) in cases {
        spec["image"] = json!("i");
        let object = microservice("orders", &spec.to_string());
        let refused = plan(&object, &Observed::default(), &settings()).unwrap_err();
        assert_eq!(refused.reason, Reason::NotItsOwn);
        assert!(refused.message.starts_with(field), "{}", refused.message);
    }
}

#[test]
fn an_autoscaler_has_its_limits_and_the_budget_goes_by_the_fewest() {
    let scaled = "{image: i, replicas: 1, resources: {requests: {cpu: 100m}}, autoscaling: {min: 2, max: 5, cpu: 70}}";
    let object = microservice("orders", scaled);
    let live = Workload { scaled_by_others: true, ..ready(4) };
    let plan = plan(&object, &Observed { deployment: Some(live), ..Observed::default() }, &settings()).unwrap();
    let autoscaler = &find(&plan, "HorizontalPodAutoscaler/orders")["spec"];
    assert_eq!((&autoscaler["minReplicas"], &autoscaler["maxReplicas"]), (&json!(2), &json!(5)));
    assert_eq!(autoscaler["scaleTargetRef"], json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "orders"}));
    assert_eq!(autoscaler["metrics"][0]["containerResource"]["container"], "service");
    assert_eq!(find(&plan, "Deployment/orders")["spec"].get("replicas"), None);
    find(&plan, "PodDisruptionBudget/orders");
}

/// The ports that are open to anybody, as one line for each rule.
fn open_ports(plan: &Plan, policy: &str) -> Vec<String> {
    let policy = find(plan, policy);
    let rules = policy["spec"]["ingress"].as_array().unwrap().iter();
    let to_all = rules.filter(|rule| rule.get("from").is_none());
    let line = |port: &serde_json::Value| {
        format!("{} {}-{}", port["protocol"].as_str().unwrap(), port["port"], port["endPort"])
    };
    to_all.flat_map(|rule| rule["ports"].as_array().unwrap().iter().map(line)).collect()
}

#[test]
fn the_relays_port_is_the_operators_and_other_ports_stay_as_they_are() {
    let mut observed = settled(&orders());
    assert!(
        !fixtures::names(&plan(&orders(), &observed, &settings()).unwrap()).contains(&"NetworkPolicy/orders".into())
    );
    observed.relays = vec![relay_of("orders")];
    let open = plan(&orders(), &observed, &settings()).unwrap();
    assert_eq!(
        open_ports(&open, "NetworkPolicy/orders"),
        ["TCP 1-9463", "TCP 9465-65535", "UDP 1-65535", "SCTP 1-65535"]
    );
    observed.isolated = true;
    let isolated = plan(&orders(), &observed, &settings()).unwrap();
    assert_eq!(open_ports(&isolated, "NetworkPolicy/orders"), [""; 0], "another policy denies by default");
    let admin = &find(&isolated, "NetworkPolicy/orders")["spec"]["ingress"][0];
    assert_eq!(admin["ports"][0]["port"], 9464);
    assert_eq!(admin["from"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], "weft-system");
}

#[test]
fn where_pods_are_isolated_orchestrators_reach_the_commands() {
    let service = "{image: i, ports: [{name: http, port: 8080}], commands: {Act: {http: {path: /act}}}}";
    let object = microservice("travel", service);
    let open = plan(&object, &Observed::default(), &settings()).unwrap();
    assert!(!fixtures::names(&open).contains(&"NetworkPolicy/travel".to_owned()));
    let isolated = plan(&object, &Observed { isolated: true, ..Observed::default() }, &settings()).unwrap();
    let rule = &find(&isolated, "NetworkPolicy/travel")["spec"]["ingress"][0];
    assert_eq!(rule["from"][0]["podSelector"]["matchLabels"]["weft.dev/owner-kind"], "Orchestrator");
    let ports: Vec<_> = rule["ports"].as_array().unwrap().iter().map(|port| port["port"].as_i64().unwrap()).collect();
    assert_eq!(ports, [8080, 15008, 4143], "directly, or through a mesh");
}

#[test]
fn every_pod_pulls_by_the_installations_secrets_and_has_no_ids_of_its_own_where_the_cluster_gives_them() {
    let mut settings = settings();
    settings.image_pull_secrets = vec!["registry".to_owned()];
    settings.fixed_user_ids = false;
    for plan in with_every_pod(&settings) {
        for child in with_pods(&plan) {
            let pod = &child["spec"]["template"]["spec"];
            let account = find(&plan, &format!("ServiceAccount/{}", pod["serviceAccountName"].as_str().unwrap()));
            assert_eq!(account["imagePullSecrets"], json!([{"name": "registry"}]));
            for field in ["runAsUser", "runAsGroup", "fsGroup\""] {
                assert!(!pod.to_string().contains(field), "{field} in {}", child["metadata"]["name"]);
            }
        }
    }
}

#[test]
fn containers_of_wefts_own_have_requests_and_limits() {
    for child in with_every_pod(&settings()).iter().flat_map(with_pods) {
        let pod = &child["spec"]["template"]["spec"];
        let containers = ["containers", "initContainers"].into_iter().filter_map(|list| pod[list].as_array());
        for container in containers.flatten().filter(|container| container["name"] != "service") {
            for (list, resource) in
                [("requests", "cpu"), ("requests", "memory"), ("limits", "cpu"), ("limits", "memory")]
            {
                assert!(container["resources"][list][resource].is_string(), "{} {list} {resource}", container["name"]);
            }
        }
    }
}
