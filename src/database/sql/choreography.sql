-- An orchestrator's database: what is seen of choreographed sagas.

-- Every definition that an instance has started with, as JSON.
create table weft.choreography_definition (
  saga text not null,
  version text not null,
  body text not null,
  primary key (saga, version)
);

-- The sagas that are followed at present. Instances of others do not keep their bucket from being dropped.
create table weft.choreography_tracked (saga text primary key);

-- How many instances of a saga have ended, ever.
create table weft.choreography_count (
  saga text primary key,
  completed bigint not null default 0,
  compensated bigint not null default 0
) with (fillfactor = 30);

-- How often something was seen that the definition does not say: `finding` is undeclared, repeated or late; `cause_service` and
-- `cause_event` are empty where the event names no cause.
create table weft.choreography_finding (
  saga text not null,
  finding text not null,
  service text not null,
  event text not null,
  cause_service text not null,
  cause_event text not null,
  count bigint not null,
  last_at timestamptz not null default clock_timestamp(),
  primary key (saga, finding, service, event, cause_service, cause_event)
) with (fillfactor = 30);

-- One row per correlation, in the buckets of weft.saga_rotate. `state` is null while the instance runs, and `Waiting` while its
-- start has not been seen: such a row is deleted after an hour. `events` is JSON, kept as text because nothing in here reads it.
create table weft.choreography (
  bucket integer not null,
  id uuid not null,
  saga text not null,
  version text not null,
  correlation text not null,
  started_at timestamptz not null,
  ended_at timestamptz,
  state text,
  compensating boolean not null,
  -- when the first of what is owed was due, if that is over
  stuck_since timestamptz,
  -- when the next of what is owed is due
  due_at timestamptz,
  events text not null,
  primary key (id, bucket)
) partition by list (bucket);
create index choreography_due on weft.choreography (due_at) where state is null;
create index choreography_stuck on weft.choreography (saga, stuck_since) where state is null and stuck_since is not null;
create index choreography_waiting on weft.choreography (started_at) where state = 'Waiting';
create index choreography_by_start on weft.choreography (saga, started_at);

grant select, insert, update, delete on
  weft.choreography_definition, weft.choreography_tracked, weft.choreography_count, weft.choreography_finding, weft.choreography
to {app};
