//! Programs that run beside the benchmark, and what they cost.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Clock ticks a second, by which `/proc` counts CPU time on every Linux that there is.
const TICKS: f64 = 100.0;

/// As the chart sets them for the operator, which alone has this allocator.
const ALLOCATOR: [(&str, &str); 3] =
    [("MALLOC_ARENA_MAX", "1"), ("MALLOC_TRIM_THRESHOLD_", "262144"), ("MALLOC_MMAP_THRESHOLD_", "131072")];

/// Ends with the benchmark, also when that is killed: `setpriv` sets the signal for the parent's death.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: &'static str,
    log: PathBuf,
}

impl Process {
    pub fn start(name: &'static str, program: &Path, arguments: &[String], folder: &Path) -> Self {
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .envs(ALLOCATOR)
            .env("KUBECONFIG", folder.join(format!("{name}.kubeconfig")))
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} ({}) does not start: {error}", program.display()));
        Self { child, name, log }
    }

    /// Panics with the end of its log if it has ended.
    pub fn assert_running(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let end: Vec<&str> = log.lines().rev().take(15).collect();
            panic!("{} ended with {status}:\n{}", self.name, end.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }

    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([&format!("-{signal}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success(), "{} cannot be sent {signal}", self.name);
    }

    /// Asks it to end, and waits until it has.
    pub fn stop(mut self) {
        self.signal("TERM");
        let begun = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(20), "{} does not end", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// User and system seconds so far.
    pub fn cpu(&self) -> f64 {
        let stat = fs::read_to_string(self.proc("stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / TICKS
    }

    /// Resident memory now [KiB].
    pub fn resident(&self) -> u64 {
        self.status("VmRSS:")
    }

    /// The most that it has had [KiB].
    pub fn peak(&self) -> u64 {
        self.status("VmHWM:")
    }

    pub fn sockets(&self) -> usize {
        let descriptors = fs::read_dir(self.proc("fd")).unwrap();
        descriptors
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|target| target.to_string_lossy().starts_with("socket:"))
            .count()
    }

    fn status(&self, field: &str) -> u64 {
        let status = fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    fn proc(&self, file: &str) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string()).join(file)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
