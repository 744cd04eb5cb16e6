//! The commands for people: what is wrong is one line on standard error, with an exit code; JSON only when it is asked for.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use std::{
    io::{Read, Write},
    net::TcpListener,
    process::{Command, Output, Stdio},
};

const ID: &str = "0192f3a4-0000-7000-8000-000000000001";
/// Nobody listens on port 1.
const NOBODY: &str = "http://127.0.0.1:1";

fn weft(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft")).args(arguments).env_remove("WEFT_ORCHESTRATOR_URL").output().unwrap()
}

/// The line on standard error, of a run that failed and wrote nothing else.
fn line(arguments: &[&str]) -> String {
    let output = weft(arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{arguments:?} succeeded");
    assert_eq!(output.stdout, b"", "{arguments:?} wrote to standard output");
    assert!(text.ends_with('\n') && text.lines().count() == 1, "{arguments:?} wrote no single line: {text}");
    let line = text.trim_end().strip_prefix("weft: ").unwrap_or_else(|| panic!("{arguments:?} wrote: {text}"));
    assert!(!line.contains('\u{1b}') && !line.starts_with('{'), "{arguments:?} wrote: {line}");
    line.to_owned()
}

/// A server that gives one answer, to one request.
fn answers(status: &str, body: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
    });
    url
}

/// Every command that asks an orchestrator.
fn commands() -> Vec<Vec<&'static str>> {
    let one = ["show", "retry", "skip", "cancel", "pause", "resume"].map(|verb| vec!["saga", verb, "orders", ID]);
    one.into_iter().chain([vec!["saga", "list", "orders"], vec!["saga", "start", "orders"]]).collect()
}

#[test]
fn a_server_that_cannot_be_reached_is_named_in_one_line() {
    for command in commands() {
        for json in [&[][..], &["-o", "json"]] {
            let line = line(&[&command, &["--orchestrator-url", NOBODY][..], json].concat());
            assert!(
                line.starts_with("no orchestrator answers at http://127.0.0.1:1; give --orchestrator-url"),
                "{line}"
            );
        }
    }
}

#[test]
fn what_an_orchestrator_refuses_is_its_own_sentence() {
    let body = r#"{"type": "urn:weft:problem:UnknownInstance", "title": "UnknownInstance", "status": 404, "detail": "there is no such instance"}"#;
    for command in commands() {
        let url = answers("404 Not Found", body);
        assert_eq!(line(&[&command, &["--orchestrator-url", &url][..]].concat()), "there is no such instance");
    }
}

#[test]
fn another_server_than_an_orchestrator_is_recognised() {
    for command in commands() {
        let url = answers("502 Bad Gateway", "<html>\n<body>bad gateway</body>\n</html>");
        let refused = line(&[&command, &["--orchestrator-url", &url][..]].concat());
        assert!(refused.contains(&url) && refused.contains("502 Bad Gateway"), "{refused}");
        let url = answers("200 OK", "<html>\n<body>welcome</body>\n</html>");
        let welcomed = line(&[&command, &["--orchestrator-url", &url, "-o", "json"][..]].concat());
        assert!(welcomed.contains("is --orchestrator-url right?"), "{welcomed}");
    }
}

#[test]
fn wrong_arguments_are_one_line_with_the_usage() {
    let line_of = |arguments: &[&str]| line(arguments);
    assert_eq!(
        line_of(&["saga", "list", "orders", "--lmit", "3"]),
        "unexpected argument '--lmit' found; tip: a similar argument exists: '--limit'; usage: weft saga list --limit <LIMIT> <SAGA>"
    );
    for arguments in [
        &["sagas"][..],
        &["-o", "json"],
        &["crds", "--folder", "x"],
        &["completion", "tcl"],
        &["operator", "--nonsense"],
        &["relay", "--nonsense"],
        &["database", "setup", "--nonsense"],
        &["saga", "run"],
        &["saga", "show", "orders"],
        &["saga", "show", "orders", "no-id"],
        &["saga", "start"],
        &["saga", "list", "orders", "--orchestrator-url", "nowhere"],
        &["saga", "list", "orders", "--orchestrator-url", "mailto:someone"],
        &["crds", "--dir", "/nowhere/at/all"],
    ] {
        line(arguments);
    }
}

#[test]
fn json_is_printed_when_it_is_asked_for_and_only_then() {
    let body = format!(
        r#"{{"items": [{{"id": "{ID}", "saga": "orders", "version": "1", "state": "Running", "startedAt": "2026-11-23T10:00:00Z"}}]}}"#
    );
    let list = |more: &[&str]| {
        let url = answers("200 OK", &body);
        let output = weft(&[&["saga", "list", "orders", "--orchestrator-url", &url], more].concat());
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    assert_eq!(value(&list(&["-o", "json"])), value(&body));
    assert!(list(&[]).starts_with("ID "));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    for arguments in [&["crds"][..], &["completion", "bash"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
        let mut child = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    for arguments in [&["--help"][..], &["--version"], &["saga", "list", "--help"]] {
        let output = weft(arguments);
        assert!(output.status.success() && output.stderr.is_empty() && !output.stdout.is_empty(), "{output:?}");
    }
}
