-- An orchestrator's database, version 1: the saga engine's log.

-- One row per partition: who writes it. The session lock (5701, partition) of the holder's connection is the fence, `epoch`
-- shows a holder that lost its connection whether another one was there in between, `beat_at` how long ago it was alive.
create table weft.saga_partition (
  partition smallint primary key,
  epoch bigint not null default 0,
  holder text not null default '',
  beat_at timestamptz not null default '-infinity'
) with (fillfactor = 30);
insert into weft.saga_partition (partition) select generate_series(0, 15);

-- Every definition that an instance has started with, as JSON.
create table weft.saga_definition (
  saga text not null,
  version text not null,
  body text not null,
  primary key (saga, version)
);

-- How many instances of a saga have ended, ever.
create table weft.saga_count (
  saga text primary key,
  completed bigint not null default 0,
  compensated bigint not null default 0
) with (fillfactor = 30);

-- One row per instance; `state` is null until it has ended.
create table weft.saga_instance (
  id uuid primary key,
  partition smallint not null,
  saga text not null,
  version text not null,
  started_at timestamptz not null,
  ended_at timestamptz,
  state text
);
create index saga_instance_live on weft.saga_instance (partition) where state is null;
create index saga_instance_by_start on weft.saga_instance (saga, started_at);

-- The log: what happened to an instance, in order. `body` is JSON, kept as text because nothing in here reads it.
create table weft.saga_event (
  id uuid not null,
  seq integer not null,
  at timestamptz not null,
  body text not null,
  primary key (id, seq)
);

grant select, insert, update, delete on
  weft.saga_partition, weft.saga_definition, weft.saga_count, weft.saga_instance, weft.saga_event
to {app};
