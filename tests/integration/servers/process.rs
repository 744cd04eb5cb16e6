//! Server processes, and signals to them.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{POLL, START_DEADLINE};

/// A server process, and the guard that kills it when this process is gone.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) child: Child,
    guard: Child,
}

impl Process {
    pub(super) fn spawn(mut command: Command, log: &Path) -> Self {
        let log = fs::OpenOptions::new().create(true).append(true).open(log).expect("the log is opened");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log).process_group(0);
        let program = command.get_program().to_owned();
        let child = command.spawn().unwrap_or_else(|error| panic!("starting {}: {error}", program.display()));
        // `read` ends when the pipe closes: because `kill9` dropped it, or because the test process is no more
        let guard = Command::new("sh")
            .args(["-c", "read -r _; kill -9 \"$0\" 2>/dev/null", &child.id().to_string()])
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("sh is started");
        Self { child, guard }
    }

    pub(super) fn wait_until(&self, ready: impl Fn() -> bool, what: &str, log: &Path) {
        let deadline = Instant::now() + START_DEADLINE;
        while !ready() {
            let text = || fs::read_to_string(log).unwrap_or_default();
            assert!(is_running(self.child.id()), "{what} ended at once: {}", text());
            assert!(Instant::now() < deadline, "{what} is not up after {START_DEADLINE:?}: {}", text());
            thread::sleep(POLL);
        }
    }

    /// Asks it to end by a signal, and kills it if it does not.
    pub(super) fn end(mut self, signal: &str) {
        send(signal, self.child.id());
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            thread::sleep(POLL);
        }
        self.kill9();
    }

    pub(super) fn signal(&self, signal: &str) {
        send(signal, self.child.id());
    }

    pub(super) fn kill9(mut self) {
        // stopped, it has no more children after they were counted
        send("-STOP", self.child.id());
        let deadline = Instant::now() + START_DEADLINE;
        while is_running(self.child.id()) && stat(self.child.id()).is_some_and(|(state, _)| state != 'T') {
            assert!(Instant::now() < deadline, "a process does not stop");
            thread::sleep(POLL);
        }
        let backends = children_of(self.child.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
        for &backend in &backends {
            send("-KILL", backend);
        }
        let deadline = Instant::now() + START_DEADLINE;
        while backends.iter().any(|&backend| is_running(backend)) {
            assert!(Instant::now() < deadline, "a killed backend is still there");
            thread::sleep(POLL);
        }
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

pub fn send(signal: &str, pid: u32) {
    let _ = Command::new("kill").args([signal, &pid.to_string()]).stderr(Stdio::null()).status();
}

/// State and parent of a process, from `/proc/PID/stat`: `PID (NAME) STATE PPID …`, where NAME may hold anything.
pub(super) fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

pub(super) fn is_running(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

pub(super) fn children_of(parent: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc is there").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| stat(pid).is_some_and(|(_, found)| found == parent)).collect()
}

/// Whether what listens on the port answers `message` by something that begins so.
pub(super) fn answers(host: &str, port: u16, message: &[u8], beginning: &[u8]) -> bool {
    let address = SocketAddr::new(host.parse().expect("an address"), port);
    let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) else { return false };
    let mut answer = vec![0; beginning.len()];
    stream.set_read_timeout(Some(Duration::from_secs(5))).is_ok()
        && stream.write_all(message).is_ok()
        && stream.read_exact(&mut answer).is_ok()
        && answer == beginning
}
