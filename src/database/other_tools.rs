//! Files that were written for another migration tool.
//!
//! Weft executes a file whole. Tools that can also go back keep both directions in one file, with markers in comments, or
//! in two files whose names tell them apart: executed whole, such a folder makes a table and drops it again. So it is
//! refused before anything is applied. Only whole comment lines and file names count, never what SQL means.

use super::migrations::Migration;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OtherTool {
    #[error(
        "migration {file} has at line {line} `{text}`, which is for {tool}: Weft executes files whole, so keep only what goes forward and remove the marker"
    )]
    Marker { file: String, line: usize, text: String, tool: &'static str },
    #[error("migration {file} is, by its name, {role} of {tool}: Weft executes every file once, so {remedy}")]
    Name { file: String, role: &'static str, tool: &'static str, remedy: &'static str },
    #[error(
        "migration {first} comes before {second}, since names are compared byte by byte; give their numbers the same number of digits, as in 009 and 010"
    )]
    Numbers { first: String, second: String },
}

/// The first file that is not for Weft.
pub fn refuse(files: &[Migration]) -> Result<(), OtherTool> {
    for file in files {
        refuse_name(file, files)?;
        refuse_markers(file)?;
    }
    refuse_numbers(files)
}

/// How a comment begins in lower case, without dashes and blanks before it, and which tool it is for.
const MARKERS: [(&str, &str); 21] = [
    ("+goose up", "goose"),
    ("+goose down", "goose"),
    ("+goose statement", "goose"),
    ("+goose envsub", "goose"),
    ("+goose no transaction", "goose"),
    ("migrate:up", "dbmate"),
    ("migrate:down", "dbmate"),
    ("+migrate up", "sql-migrate"),
    ("+migrate down", "sql-migrate"),
    ("+migrate statement", "sql-migrate"),
    ("+micrate up", "micrate"),
    ("+micrate down", "micrate"),
    ("rambler up", "rambler"),
    ("rambler down", "rambler"),
    ("up migration", "node-pg-migrate"),
    ("down migration", "node-pg-migrate"),
    ("create above / drop below", "tern"),
    ("//@undo", "MyBatis Migrations"),
    ("@undo", "MyBatis Migrations"),
    ("liquibase formatted sql", "Liquibase"),
    ("rollback ", "Liquibase"),
];
/// Comments that are markers only when there is nothing else on their line.
const WHOLE_MARKERS: [(&str, &str); 6] = [
    ("!ups", "Play evolutions"),
    ("!downs", "Play evolutions"),
    ("==== up ====", "shmig"),
    ("==== down ====", "shmig"),
    ("+up", "a tool that goes both ways"),
    ("+down", "a tool that goes both ways"),
];

fn refuse_markers(file: &Migration) -> Result<(), OtherTool> {
    let is_liquibase = file.sql.to_ascii_lowercase().contains("liquibase formatted sql");
    for (line, text) in (1..).zip(file.sql.lines()) {
        let Some(comment) = comment(text) else { continue };
        let begun = MARKERS.iter().find(|(marker, _)| comment.starts_with(marker));
        let begun = begun.filter(|(marker, _)| *marker != "rollback " || is_liquibase);
        let found = begun.or_else(|| WHOLE_MARKERS.iter().find(|(marker, _)| comment == *marker));
        let tool = found.map(|(_, tool)| *tool).or_else(|| sqitch(&comment));
        if let Some(tool) = tool {
            let text = text.trim().chars().take(80).collect();
            return Err(OtherTool::Marker { file: file.name.clone(), line, text, tool });
        }
    }
    Ok(())
}

/// What a comment line says, in lower case. `#` is a comment for some tools, and never SQL.
fn comment(line: &str) -> Option<String> {
    let line = line.trim().trim_start_matches('\u{feff}');
    let comment = line.strip_prefix("--").or_else(|| line.strip_prefix('#'))?;
    Some(comment.trim_start_matches(['-', ' ', '\t']).trim_end().to_ascii_lowercase())
}

/// The first line that sqitch gives a file: `-- Revert flipr:users from pg`.
fn sqitch(comment: &str) -> Option<&'static str> {
    let (verb, rest) = comment.split_once(' ')?;
    let (change, engine) = rest.rsplit_once(' ').and_then(|(head, engine)| Some((head.rsplit_once(' ')?, engine)))?;
    let is_verb = matches!((verb, change.1), ("deploy", "to") | ("revert", "from") | ("verify", "on"));
    (is_verb && change.0.contains(':') && matches!(engine, "pg" | "cockroach")).then_some("sqitch")
}

fn refuse_name(file: &Migration, files: &[Migration]) -> Result<(), OtherTool> {
    const BACK: &str = "leave the files that go back out of the ConfigMap";
    const NUMBER: &str = "give it a name that begins with a number, if it is to be executed once, or leave it out";
    let refused = |role, tool, remedy| Err(OtherTool::Name { file: file.name.clone(), role, tool, remedy });
    let stem = file.name.strip_suffix(".sql").unwrap_or(&file.name);
    for (down, up, tool) in DIRECTIONS {
        let Some(change) = stem.strip_suffix(down) else { continue };
        let is_separated = change.is_empty() || change.ends_with('.');
        let siblings = [format!("{change}{up}.sql"), format!("{}.sql", change.trim_end_matches(['-', '_']))];
        let is_pair = change.ends_with(['-', '_']) && files.iter().any(|other| siblings.contains(&other.name));
        if is_separated || is_pair {
            return refused("the way back", tool, BACK);
        }
    }
    if let Some((prefix, _)) = stem.split_once("__") {
        let is_version = |version: &str| version.starts_with(|c: char| c.is_ascii_digit());
        match (prefix.get(..1), prefix.get(1..).unwrap_or_default()) {
            (Some("U"), version) if is_version(version) => return refused("the way back", "Flyway", BACK),
            (Some("R"), "") => return refused("a repeatable migration", "Flyway", NUMBER),
            (Some("B"), version) if is_version(version) => return refused("a baseline", "Flyway", NUMBER),
            _ => {}
        }
    }
    if CALLBACKS.iter().any(|callback| stem.starts_with(callback)) {
        return refused("a callback", "Flyway", NUMBER);
    }
    Ok(())
}

/// Ends of names: the way back, the way forward beside it, and whose they are.
const DIRECTIONS: [(&str, &str, &str); 5] = [
    ("down", "up", "golang-migrate, sqlx or the like"),
    ("undo", "do", "Postgrator"),
    ("rollback", "", "yoyo"),
    ("revert", "", "a tool that goes both ways"),
    ("drop", "create", "a tool that goes both ways"),
];

const CALLBACKS: [&str; 10] = [
    "beforeMigrate",
    "afterMigrate",
    "beforeEachMigrate",
    "afterEachMigrate",
    "beforeUndo",
    "afterUndo",
    "beforeRepeatables",
    "afterVersioned",
    "beforeValidate",
    "afterValidate",
];

/// `10_x.sql` sorts before `9_x.sql`: whoever wrote that meant the other order.
fn refuse_numbers(files: &[Migration]) -> Result<(), OtherTool> {
    let numbered: Vec<_> = files.iter().filter_map(|file| Some((file, version(&file.name)?))).collect();
    match numbered.iter().zip(numbered.iter().skip(1)).find(|((_, one), (_, next))| one > next) {
        Some(((first, _), (second, _))) => {
            Err(OtherTool::Numbers { first: first.name.clone(), second: second.name.clone() })
        }
        None => Ok(()),
    }
}

/// The number that a name begins with; for Flyway's names, `V1.10__x.sql`, its parts.
fn version(name: &str) -> Option<Vec<u128>> {
    let number = |text: &str| {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text.get(..digits)?.parse().ok()
    };
    match name.strip_prefix(['V', 'v']).and_then(|rest| rest.split_once("__")) {
        Some((parts, _)) => parts.split(['.', '_']).map(number).collect(),
        None => Some(vec![number(name)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, sql: &str) -> Migration {
        Migration { name: name.into(), sql: sql.into() }
    }

    fn refused(files: &[(&str, &str)]) -> Option<String> {
        let files: Vec<_> = files.iter().map(|(name, sql)| file(name, sql)).collect();
        refuse(&files).err().map(|error| error.to_string())
    }

    #[test]
    fn a_marker_is_refused_with_its_line() {
        let sql = "\n-- +goose Up\ncreate table a (id int);\n-- +goose Down\ndrop table a;";
        assert_eq!(
            refused(&[("001_a.sql", sql)]).unwrap(),
            "migration 001_a.sql has at line 2 `-- +goose Up`, which is for goose: Weft executes files whole, so keep only what goes forward and remove the marker"
        );
    }

    #[test]
    fn every_tools_marker_is_known() {
        for (line, tool) in [
            ("--+goose Up", "goose"),
            ("  -- +goose StatementBegin", "goose"),
            ("-- +goose NO TRANSACTION", "goose"),
            ("-- migrate:up", "dbmate"),
            ("--migrate:down transaction:false", "dbmate"),
            ("-- +migrate Down", "sql-migrate"),
            ("-- +micrate Up", "micrate"),
            ("-- rambler down", "rambler"),
            ("-- Down Migration", "node-pg-migrate"),
            ("---- create above / drop below ----", "tern"),
            ("-- //@UNDO", "MyBatis Migrations"),
            ("--liquibase formatted sql", "Liquibase"),
            ("--  liquibase formatted SQL", "Liquibase"),
            ("# --- !Downs", "Play evolutions"),
            ("-- !Ups", "Play evolutions"),
            ("-- ==== DOWN ====", "shmig"),
            ("-- Revert flipr:users from pg", "sqitch"),
            ("-- Deploy flipr:users to pg", "sqitch"),
        ] {
            let sentence = refused(&[("001.sql", &format!("select 1;\r\n{line}\r\nselect 2;"))]).expect(line);
            assert!(sentence.starts_with("migration 001.sql has at line 2"), "{sentence}");
            assert!(sentence.contains(&format!("which is for {tool}")), "{sentence}");
        }
    }

    #[test]
    fn comments_of_people_are_left_alone() {
        for line in [
            "-- rollback is not possible",
            "-- up and down the stairs",
            "-- migrate the rows of 2019",
            "-- goose is a bird",
            "-- Deploy: after the orders service to production",
            "-- revert that later",
            "select '-- +goose Down';",
            "-- +1",
            "-->statement-breakpoint",
            "--! Previous: sha1:0",
        ] {
            assert_eq!(refused(&[("001.sql", line)]), None, "{line}");
        }
    }

    #[test]
    fn files_that_go_back_are_refused_by_their_names() {
        for (name, tool) in [
            ("000002_x.down.sql", "golang-migrate"),
            ("down.sql", "golang-migrate"),
            ("001.undo.x.undo.sql", "Postgrator"),
            ("0001.x.rollback.sql", "yoyo"),
            ("U2__x.sql", "Flyway"),
            ("U1.1__x.sql", "Flyway"),
            ("R__views.sql", "Flyway"),
            ("B3__base.sql", "Flyway"),
            ("afterMigrate.sql", "Flyway"),
            ("beforeEachMigrate__x.sql", "Flyway"),
        ] {
            let sentence = refused(&[(name, "select 1")]).expect(name);
            assert!(sentence.starts_with(&format!("migration {name} is, by its name, ")), "{sentence}");
            assert!(sentence.contains(tool), "{sentence}");
        }
        for up in ["20200101-x-up.sql", "20200101-x.sql"] {
            assert!(refused(&[("20200101-x-down.sql", ""), (up, "")]).unwrap().contains("20200101-x-down.sql"));
        }
        for name in
            ["001_slow_down.sql", "V1__users.sql", "002_undo.sql", "003.up.sql", "Users__x.sql", "Report__x.sql"]
        {
            assert_eq!(refused(&[(name, "select 1")]), None, "{name}");
        }
    }

    #[test]
    fn numbers_whose_order_is_not_that_of_the_names_are_refused() {
        let sentence = refused(&[("10_b.sql", ""), ("9_a.sql", "")]).unwrap();
        assert!(sentence.starts_with("migration 10_b.sql comes before 9_a.sql"), "{sentence}");
        assert!(refused(&[("V10__b.sql", ""), ("V2__a.sql", "")]).is_some());
        assert!(refused(&[("V1.10__b.sql", ""), ("V1.9__a.sql", "")]).is_some());
        assert_eq!(refused(&[("009_a.sql", ""), ("010_b.sql", ""), ("2024_c.sql", ""), ("x.sql", "")]), None);
        assert_eq!(refused(&[("V1.9__a.sql", ""), ("V2__b.sql", "")]), None);
    }
}
