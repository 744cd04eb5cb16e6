//! A database that a person sets up, on a server to which Weft has no superuser's login: the script for `psql`, and the check that
//! it was run.
//!
//! The script does what a set-up does, each part once, so that it may be run again after an update of Weft or for a new migration.
//! Its migrations are executed by the person's own login, as the owner: whoever runs it reads them first.

use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::Client;

use super::{
    DatabaseError, Progress, fitness, in_time,
    layout::{self, LAYOUT},
    migrations::{self, Migration},
    no_transaction, require,
    roles::Roles,
    session,
};
use crate::contract::{
    database_setup::{DatabaseSetup, Outcome, migrations_hash},
    outbox::Outbox,
};

const HEAD: &str = "\
-- What `weft database setup` needs in this database and may not do itself. Run it with psql, connected to the database as a
-- superuser; it may be run again at any time. Passwords are psql's variables, and only set when they are given:
--     psql … -v app_password=… -v relay_password=… -f setup.sql
\\set ON_ERROR_STOP on
set client_min_messages = warning;
-- no password in the server's log
set log_statement = none;
set log_min_duration_statement = -1;
set log_min_error_statement = panic;
";

/// The script for `psql`.
pub fn script(setup: &DatabaseSetup, roles: &Roles, files: &[Migration]) -> String {
    let mut text = HEAD.to_owned();
    let mut add = |sql: &str| text.extend([sql.trim_end(), "\n"]);
    let logins = std::iter::once(&roles.app).chain(&roles.relay).map(|login| &login.name);
    for role in logins.chain([&roles.owner, &roles.migrator]) {
        let (name, quoted) = (escape_literal(role), escape_identifier(role));
        once(
            &mut add,
            &format!("not exists (select from pg_roles where rolname = {name})"),
            &format!("create role {quoted};"),
        );
    }
    add(&roles.attributes_without_passwords());
    let passwords = [Some((&roles.app, "app_password")), roles.relay.as_ref().map(|relay| (relay, "relay_password"))];
    for (login, variable) in passwords.into_iter().flatten() {
        let name = escape_identifier(&login.name);
        add(&format!("\\if :{{?{variable}}}\nalter role {name} password :'{variable}';\n\\endif"));
    }
    add(&format!("begin;\n{};\n{}\ncommit;", roles.privileges(), roles.fill(LAYOUT)));
    for (part, version, sql) in layout::files(setup.purpose) {
        let is_older = format!("coalesce((select version from weft.layout where part = '{part}'), 0) < {version}");
        let record = format!(
            "insert into weft.layout (part, version) values ('{part}', {version})
    on conflict (part) do update set version = excluded.version, applied_at = excluded.applied_at;"
        );
        once(&mut add, &roles.fill(&is_older), &roles.fill(&format!("begin;\n{sql}\n{record}\ncommit;")));
    }
    let app = escape_identifier(&roles.app.name);
    add(&roles.fill(&format!("grant select on weft.layout, weft.migration to {app};")));
    let (owner, own, weft) = (escape_identifier(&roles.owner), &roles.schemas.own, &roles.schemas.weft);
    for migration in files {
        let (literal, sha256, sql) = (escape_literal(&migration.name), migration.sha256(), migration.text());
        let is_new = roles.fill(&format!("not exists (select from weft.migration where name = {literal})"));
        let record = roles.fill(&format!("insert into weft.migration (name, sha256) values ({literal}, '{sha256}');"));
        let (begin, local, commit) =
            if no_transaction::is_asked(migration) { ("", "", "") } else { ("begin;\n", "local ", "\ncommit;") };
        once(
            &mut add,
            &is_new,
            &format!(
                "{begin}set {local}role {owner};\nset {local}search_path = {own}, {weft};\n{sql}\n;\nreset role;\n{record}{commit}"
            ),
        );
    }
    text
}

fn once(add: &mut impl FnMut(&str), condition: &str, sql: &str) {
    add(&format!("select {condition} as weft_todo \\gset\n\\if :weft_todo\n{sql}\n\\endif"));
}

/// What the person has set up, as the service's own login sees it; the sentence says what is missing.
pub async fn check(
    setup: &DatabaseSetup,
    roles: &Roles,
    files: &[Migration],
    progress: &Progress,
) -> Result<Outcome, DatabaseError> {
    let app = Box::pin(in_time("look at the database", session::as_role(setup, &setup.app))).await;
    let app = app.map_err(|error| match error {
        DatabaseError::LoginRefused { database, role, refusal, .. } => DatabaseError::ByHand {
            missing: format!("the login of role {role} at database {database} (the server says: {refusal})"),
        },
        error => error,
    });
    let app = app?.client;
    fitness::check_version_and_log(&app, setup).await?;
    let missing = in_time("look at the database", missing(&app, setup, roles, files)).await?;
    if !missing.is_empty() {
        return Err(DatabaseError::ByHand { missing: missing.join(", ") });
    }
    let applied = migrations::applied(&app, &roles.schemas).await;
    let applied = applied.map_err(DatabaseError::while_doing("read what is migrated"))?;
    require(setup.last_migration.as_deref(), files, &applied)?;
    Ok(Outcome {
        files: files.len(),
        applied: progress.applied,
        last: applied.last().map(|last| last.name.clone()),
        hash: migrations_hash(files.iter().map(|file| (file.name.as_str(), file.sql.as_str()))),
        written_by_others: Vec::new(),
    })
}

async fn missing(
    app: &Client,
    setup: &DatabaseSetup,
    roles: &Roles,
    files: &[Migration],
) -> Result<Vec<String>, DatabaseError> {
    let failed = DatabaseError::while_doing("find out what is set up");
    if !matches!(setup.outbox, None | Some(Outbox::Weft)) {
        return Err(DatabaseError::Unfit(
            "spec.outbox of the OutboxRelay names a table of the team's, whose trigger only a set-up with `admin-username` and `admin-password` can make: add them to the Secret, or use the layout Weft".to_owned(),
        ));
    }
    let mut missing = Vec::new();
    if let Some(relay) = &roles.relay {
        let is_there = "select from pg_roles where rolname = $1 and rolcanlogin and rolreplication";
        if app.query_opt(is_there, &[&relay.name]).await.map_err(&failed)?.is_none() {
            missing.push(format!("the role {}", relay.name));
        }
    }
    let readable = roles.fill("select has_schema_privilege(oid, 'usage') from pg_namespace where nspname = 'weft'");
    let readable = app.query_opt(&readable, &[]).await.map_err(&failed)?;
    if !readable.map(|row| row.try_get(0)).transpose().map_err(&failed)?.unwrap_or(false) {
        missing.push("the schema weft".to_owned());
        missing.extend(files.iter().map(|file| format!("the migration {}", file.name)));
        return Ok(missing);
    }
    for (part, version, _) in layout::files(setup.purpose) {
        let there = roles.fill("select from weft.layout where part = $1 and version >= $2");
        if app.query_opt(&there, &[&part, &version]).await.map_err(&failed)?.is_none() {
            missing.push(format!("version {version} of the tables of the part {part}"));
        }
    }
    let mut applied = migrations::applied(app, &roles.schemas).await.map_err(&failed)?;
    while let Some(next) = migrations::next(files, &applied)? {
        missing.push(format!("the migration {}", next.name));
        applied.push(migrations::Applied { name: next.name.clone(), sha256: next.sha256() });
    }
    Ok(missing)
}
