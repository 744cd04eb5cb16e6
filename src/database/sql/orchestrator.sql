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

-- Which store this is: a part of what its orchestrator is called at a broker, so that two clusters do not share a consumer. It
-- is restored with the rest.
create table weft.saga_store (id uuid not null default gen_random_uuid());
insert into weft.saga_store default values;

-- How far the events that start sagas are read, by stream: all before `next` are handled. `stream_created` is what the server
-- says; a stream that is made again counts from 1.
create table weft.saga_start (
  saga text not null,
  service text not null,
  event_type text not null,
  stream text not null,
  stream_created text not null,
  next bigint not null,
  primary key (saga, service, event_type, stream)
);

-- Events that can never start their saga, for a month.
create table weft.saga_dead_start (
  saga text not null,
  stream text not null,
  sequence bigint not null,
  subject text not null,
  event_id text,
  reason text not null,
  at timestamptz not null default clock_timestamp(),
  primary key (saga, stream, sequence)
);

grant select on weft.saga_store to {app};
grant select, insert, update, delete on weft.saga_start, weft.saga_dead_start to {app};
