-- An effect of a saga's command. No key: that each is there once is what the tests check.
create table effect (
    position bigint generated always as identity,
    saga     text not null,
    step     text not null,
    op       text not null,
    at       timestamptz not null default clock_timestamp()
);

-- An event that was written to the outbox, in the same transaction.
create table ledger (
    aggregate text not null,
    n         integer not null,
    id        uuid not null,
    primary key (aggregate, n)
);

-- An event that a relay sent over HTTP, each time that it came.
create table received (
    position bigint generated always as identity,
    id       text not null,
    kind     text not null,
    subject  text not null,
    tenant   text not null,
    body     text not null
);

-- The effect of an event that was consumed. No key: that each is there once, and in order, is what the tests check.
create table consumed (
    position  bigint generated always as identity,
    aggregate text not null,
    n         integer not null
);

-- What a test tells the service, whatever pod runs it.
create table switch (
    name text primary key
);
