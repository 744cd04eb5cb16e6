//! PostgreSQL's programs.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use super::{
    SUPERUSER, SUPERUSER_PASSWORD,
    files::{User, accessible_folder, cached, copy_folder, give, installed_under, is_root, own_uid},
};

/// PostgreSQL's programs, and the user that they must run as.
#[derive(Clone, Debug)]
pub(super) struct Installation {
    pub(super) version: u32,
    pub(super) bin: PathBuf,
    pub(super) user: Option<User>,
}

impl Installation {
    pub(super) fn newest() -> Self {
        static NEWEST: OnceLock<Option<(u32, PathBuf)>> = OnceLock::new();
        let newest = NEWEST.get_or_init(|| {
            let told = std::env::var_os("WEFT_TEST_POSTGRES").map(PathBuf::from);
            let folders = told.into_iter().chain(installed_under("/usr/lib/postgresql")).chain(cached("postgresql-"));
            folders
                .map(|folder| folder.join("bin"))
                .filter_map(|bin| Some((major_version(&bin.join("postgres"))?, bin)))
                .max_by_key(|(version, _)| *version)
        });
        let Some((version, bin)) = newest.clone() else {
            panic!(
                "PostgreSQL's server is missing: install the package `postgresql`, or set WEFT_TEST_POSTGRES to a folder with bin/postgres"
            );
        };
        let user = is_root().then(|| {
            User::named("postgres").expect(
                "the tests run as root and PostgreSQL refuses to: add a user `postgres` (`useradd --system postgres`)",
            )
        });
        let installation = Self { version, bin, user };
        if installation.command("postgres").arg("--version").stdout(Stdio::null()).status().is_ok() {
            return installation;
        }
        Self { bin: installation.staged().join("bin"), ..installation }
    }

    /// A copy that the user `postgres` may run, of an installation in a folder that is closed to it, such as `/root`.
    pub(super) fn staged(&self) -> PathBuf {
        static STAGED: OnceLock<PathBuf> = OnceLock::new();
        let stage = || {
            let path = std::env::temp_dir().join(format!("weft-postgres-{}", self.version));
            if !path.exists() {
                let making = accessible_folder("weft-postgres-", None);
                let copy = making.path().join("copy");
                copy_folder(self.bin.parent().expect("bin is in a folder"), &copy, None);
                let _ = Command::new("chmod").args(["-R", "a+rX"]).arg(&copy).status();
                // another test process may have been faster, which is fine
                let _ = fs::rename(&copy, &path);
            }
            path
        };
        STAGED.get_or_init(stage).clone()
    }

    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.current_dir("/").env("LC_ALL", "C.UTF-8").env("TZ", "UTC");
        if let Some(user) = &self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// A data folder fresh from `initdb`, made once per version and user on this machine.
    pub(super) fn template(&self) -> PathBuf {
        static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
        TEMPLATE.get_or_init(|| self.make_template()).clone()
    }

    pub(super) fn make_template(&self) -> PathBuf {
        let owner = self.user.as_ref().map_or_else(own_uid, |user| user.uid);
        let path = std::env::temp_dir().join(format!("weft-postgres-{}-template-{owner}", self.version));
        if path.join("PG_VERSION").exists() {
            return path;
        }
        let making = accessible_folder("weft-initdb-", self.user.as_ref());
        let (password, data) = (making.path().join("password"), making.path().join("data"));
        fs::write(&password, SUPERUSER_PASSWORD).expect("the password file is written");
        give(&password, self.user.as_ref());
        let mut command = self.command("initdb");
        command.args(["--no-sync", "--encoding=UTF8", "--no-locale", "--auth=scram-sha-256", "--username", SUPERUSER]);
        command.arg("--pwfile").arg(&password).arg("-D").arg(&data);
        let output = command.output().expect("initdb is started");
        assert!(output.status.success(), "initdb failed: {}", String::from_utf8_lossy(&output.stderr));
        // another test process may have been faster: then its folder is there and the rename fails, which is fine
        let _ = fs::rename(&data, &path);
        assert!(path.join("PG_VERSION").exists(), "the template {} is there", path.display());
        path
    }
}

/// `postgres (PostgreSQL) 17.6` → 17; `None` when the program is absent or doesn't run here.
pub(super) fn major_version(postgres: &Path) -> Option<u32> {
    let output = Command::new(postgres).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let number = text.split_whitespace().nth(2)?;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
