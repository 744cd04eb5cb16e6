//! The schemas of a service in its database: its own, and Weft's.
//!
//! A database of the service's own has `public` and `weft`. In one that is another service's it has a schema of its own, and
//! Weft's tables for it are in a schema beside that. Weft's SQL is written for `weft`, and says another name where it has one.

use crate::{
    contract::{Server, database_setup::DatabaseSetup},
    domain::names,
};

/// Whose the database is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tenancy {
    /// Weft made it for this service: nobody else gets in.
    Own,
    /// Somebody else's server: what others may do there stays as it is.
    Adopted,
    /// Another service's.
    Shared,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schemas {
    pub tenancy: Tenancy,
    /// Of what migrations make.
    pub own: String,
    /// Of Weft's tables and functions.
    pub weft: String,
}

impl Schemas {
    pub fn of(setup: &DatabaseSetup) -> Self {
        let own = setup.schema.clone();
        let weft = own.as_deref().map_or_else(|| names::SCHEMA.to_owned(), names::weft_schema);
        let tenancy = match (&setup.schema, &setup.admin.server) {
            (Some(_), _) => Tenancy::Shared,
            (None, Server::Folder { .. }) => Tenancy::Adopted,
            (None, Server::Address { .. }) => Tenancy::Own,
        };
        Self { tenancy, own: own.unwrap_or_else(|| "public".to_owned()), weft }
    }

    /// Name of the migrator's role in `database`. Roles belong to the server, so that two of them must not share one whose
    /// password changes with every run.
    pub fn migrator_of(&self, database: &str) -> String {
        match self.tenancy {
            Tenancy::Own | Tenancy::Adopted => names::role_of("weft_migrator_", database),
            Tenancy::Shared => names::role_of(&format!("weft_migrator_{}_", self.own), database),
        }
    }

    /// SQL that is written for the schema `weft`, for the one that this service has.
    pub fn fill(&self, sql: &str) -> String {
        if self.weft == names::SCHEMA {
            return sql.to_owned();
        }
        let (mut filled, mut rest) = (String::with_capacity(sql.len() + 64), sql);
        while let Some(at) = rest.find(names::SCHEMA) {
            let (before, found) = rest.split_at(at);
            let after = &found[names::SCHEMA.len()..];
            filled.push_str(before);
            filled.push_str(if is_the_schema(&filled, after) { &self.weft } else { names::SCHEMA });
            rest = after;
        }
        filled.push_str(rest);
        filled
    }
}

/// Whether `weft` between these texts is the schema: `weft.outbox`, `schema weft`, `'weft'`, or in the name of the publication.
fn is_the_schema(before: &str, after: &str) -> bool {
    let continues = |c: char| c.is_alphanumeric() || matches!(c, '_' | '"' | '-');
    let begins = !before.ends_with(continues);
    let ends = !after.starts_with(continues);
    let is_qualifier = after.starts_with('.');
    let is_named = ends && (before.ends_with("schema ") || before.ends_with("exists "));
    let is_literal = before.ends_with('\'') && after.starts_with('\'');
    let is_publication = after.starts_with("_outbox") && !after["_outbox".len()..].starts_with(continues);
    begins && (is_qualifier || is_named || is_literal || is_publication)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schemas(own: &str) -> Schemas {
        Schemas { tenancy: Tenancy::Shared, own: own.to_owned(), weft: names::weft_schema(own) }
    }

    #[test]
    fn wefts_own_sql_is_of_the_services_schema_and_a_teams_is_left_alone() {
        for (sql, filled) in [
            ("select weft.enter('a')", "select weft_reports.enter('a')"),
            ("grant usage on schema weft to x", "grant usage on schema weft_reports to x"),
            ("create schema if not exists weft;", "create schema if not exists weft_reports;"),
            ("pronamespace = 'weft'::regnamespace", "pronamespace = 'weft_reports'::regnamespace"),
            (
                "create publication weft_outbox for table weft.outbox",
                "create publication weft_reports_outbox for table weft_reports.outbox",
            ),
            (
                "new.\"weft\", \"weft\".x, a_weft.x, weftig.x, weft_outboxes",
                "new.\"weft\", \"weft\".x, a_weft.x, weftig.x, weft_outboxes",
            ),
        ] {
            assert_eq!(schemas("reports").fill(sql), filled);
        }
    }

    #[test]
    fn a_migrators_name_fits_the_server() {
        let own = Schemas { tenancy: Tenancy::Own, own: "public".to_owned(), weft: "weft".to_owned() };
        assert_eq!(own.migrator_of("order_history"), "weft_migrator_order_history");
        assert_eq!(own.migrator_of(&"ö".repeat(31)).len(), 62);
        assert_eq!(schemas("reports").migrator_of("orders"), "weft_migrator_reports_orders");
    }
}
