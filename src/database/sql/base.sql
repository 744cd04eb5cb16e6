-- What every database of Weft has, whatever its purpose, version 1: the record of a service's migrations.
--
-- Migrations are executed in the session of a plain login, which may not write here. So that a file and its record are
-- committed together, that session calls two functions: one before the file, and one after it, with a token that only
-- `weft database setup` knows.
grant usage on schema weft to {owner}, {app};

-- The proof that a migration was applied. Weft never deletes a row.
create table weft.migration (
    name       text primary key,
    sha256     text not null,
    applied_at timestamptz not null default clock_timestamp()
);

-- The migration that a set-up is about to apply, or failed to apply last: at most one row, written by the superuser.
create table weft.migration_attempt (
    one         boolean primary key default true check (one),
    name        text not null,
    sha256      text not null,
    token       text not null,
    -- the one that executes the file
    transaction xid8
);

-- Comes before the file, in its transaction. While that is open, no other set-up gets at the row.
create function weft.begin_migration() returns void
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    update weft.migration_attempt set transaction = pg_current_xact_id();
end
$$;

-- Refuses a commit between `begin_migration` and `end_migration`, so one that the file itself asks for. The server knows
-- where it is, in whatever quotes or comments; the rest of the file is then not executed.
create function weft.refuse_commit() returns trigger
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from weft.migration_attempt as a where a.transaction = pg_current_xact_id()) then
        raise exception 'the transaction of the migration ends before the migration' using errcode = 'WEFT1';
    end if;
    return null;
end
$$;

create constraint trigger refuse_commit after update on weft.migration_attempt
    deferrable initially deferred
    for each row execute function weft.refuse_commit();

-- Comes after the file, in its transaction: records it. The session's own role, which can own nothing but large objects,
-- must own nothing: everything belongs to the owner.
create function weft.end_migration(token text) returns void
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    attempt weft.migration_attempt;
    object text;
begin
    delete from weft.migration_attempt as a where a.token = end_migration.token returning * into attempt;
    if not found then
        raise exception 'another set-up has begun meanwhile' using errcode = 'WEFT3';
    end if;
    if attempt.transaction is distinct from pg_current_xact_id() then
        raise exception 'the transaction of the migration ended before the migration' using errcode = 'WEFT1';
    end if;
    select pg_describe_object(d.classid, d.objid, d.objsubid) into object
      from pg_shdepend as d
     where d.dbid = (select oid from pg_database where datname = current_database())
       and d.refclassid = 'pg_authid'::regclass
       and d.refobjid = (select oid from pg_roles where rolname = session_user)
       and d.deptype = 'o'
     limit 1;
    if found then
        raise exception '%', object using errcode = 'WEFT2';
    end if;
    -- a table that takes the place of the service's outbox is followed from the commit on: see src/database/outbox
    if to_regprocedure('weft.keep_outbox()') is not null then
        perform weft.keep_outbox();
    end if;
    insert into weft.migration (name, sha256) values (attempt.name, attempt.sha256);
end
$$;

revoke execute on all functions in schema weft from public;
grant execute on function weft.begin_migration(), weft.end_migration(text) to {owner};
