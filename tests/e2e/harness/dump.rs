//! What a person needs to see of a failed scenario.

use std::{fmt::Write, path::PathBuf};

use super::{Scenario, root, shell};

/// Lines of the dump that go into the failure's message; the file has all. Whoever has only the output of a CI sees the end
/// of it, so the failures of several scenarios must fit there.
const SHOWN: usize = 50;

impl Scenario {
    /// The file that has all of it, and the part to show.
    pub async fn dump(&self, error: &anyhow::Error) -> (PathBuf, String) {
        let mut text = format!("{}: {error:#}\n", self.name);
        let mut namespaces = vec![self.namespace.clone()];
        namespaces.extend(self.others.lock().map(|others| others.clone()).unwrap_or_default());
        for namespace in &namespaces {
            for (title, args) in [
                ("conditions", CONDITIONS),
                ("pods", "get pods,jobs"),
                ("warnings", "get events --field-selector type=Warning --sort-by=.lastTimestamp"),
                ("custom resources", "get microservices,outboxrelays,sagas -o wide"),
                ("volumes", "get pvc"),
                ("events", "get events --sort-by=.lastTimestamp"),
                ("logs of the operator", "logs --selector app.kubernetes.io/component=operator --tail 60 --prefix"),
            ] {
                section(&mut text, namespace, title, args).await;
            }
            for pod in self.pod_names(namespace).await {
                let args = format!("logs {pod} --all-containers --prefix --tail 25");
                section(&mut text, namespace, &format!("logs of {pod}"), &args).await;
                let args = format!("logs {pod} --all-containers --prefix --tail 10 --previous");
                section(&mut text, namespace, &format!("logs of {pod} before its restart"), &args).await;
            }
        }
        let folder = root().join("target/e2e");
        let file = folder.join(format!("{}.txt", self.name));
        if let Err(error) = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&file, &text)) {
            let _ = writeln!(text, "writing {}: {error}", file.display());
        }
        let shown: Vec<&str> = text.lines().take(SHOWN).collect();
        (file, shown.join("\n"))
    }

    async fn pod_names(&self, namespace: &str) -> Vec<String> {
        let names = shell::kubectl(&["get", "pods", "--namespace", namespace, "-o", "name"]).await.unwrap_or_default();
        names.lines().map(str::to_owned).collect()
    }
}

const CONDITIONS: &str = r#"get microservices,outboxrelays,sagas -o jsonpath={range .items[*]}{.kind}{"/"}{.metadata.name}{"\n"}{range .status.conditions[*]}{"  "}{.type}={.status}{"\t"}{.reason}{"\t"}{.message}{"\n"}{end}{end}"#;

async fn section(text: &mut String, namespace: &str, title: &str, args: &str) {
    // a jsonpath has blanks of its own
    let mut words: Vec<&str> = match args.split_once(" -o jsonpath=") {
        None => args.split(' ').collect(),
        Some((before, _)) => {
            before.split(' ').chain(["-o", args.split_once(" -o ").map_or("", |(_, path)| path)]).collect()
        }
    };
    words.extend(["--namespace", namespace]);
    let said = shell::kubectl(&words).await;
    if let Ok(said) = said
        && !said.trim().is_empty()
    {
        let _ = write!(text, "\n--- {title} ({namespace})\n{said}");
    }
}
