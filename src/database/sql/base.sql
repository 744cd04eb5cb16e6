-- What every database of Weft has, whatever its purpose. Applied on each run, so every statement can be repeated.
create schema if not exists weft;
grant usage on schema weft to {owner}, {app};

-- Which version of Weft's own tables and functions is here; one row per part.
create table if not exists weft.layout (
    part       text primary key,
    version    integer not null,
    applied_at timestamptz not null default now()
);

-- The service's migrations. Weft never deletes a row.
create table if not exists weft.migration (
    name       text primary key,
    sha256     text not null,
    applied_at timestamptz not null default now()
);
