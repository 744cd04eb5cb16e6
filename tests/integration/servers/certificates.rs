//! Certificates for test servers, made by `openssl`.

use std::{
    path::Path,
    process::{Command, Stdio},
};

/// Makes `ca.crt`, and `tls.crt` with `tls.key` for a server on 127.0.0.1 and for a client that is called `relay`.
pub(super) fn make(folder: &Path) {
    let request = |arguments: &[&str]| {
        let mut command = Command::new("openssl");
        command.current_dir(folder).args(["req", "-x509", "-nodes", "-days", "2"]);
        command.args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]).args(arguments);
        let status = command.stderr(Stdio::null()).status().expect("openssl is started");
        assert!(status.success(), "openssl {arguments:?}");
    };
    request(&["-subj", "/CN=Tests", "-keyout", "ca.key", "-out", "ca.crt"]);
    let issuer = ["-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"];
    let named = ["-addext", "subjectAltName=IP:127.0.0.1", "-subj", "/CN=relay"];
    request(&[&issuer[..], &named, &["-keyout", "tls.key", "-out", "tls.crt"]].concat());
}
