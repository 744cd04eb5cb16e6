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

-- Instances and their log are kept in buckets: those that started in the same stretch of time. What is old is dropped with
-- its bucket, which costs the same however much is in it.
create table weft.saga_bucket (
  bucket integer primary key,
  opened_at timestamptz not null default clock_timestamp(),
  -- when it last was the newest or had a live instance, as of the last call of weft.saga_rotate
  live_at timestamptz not null default clock_timestamp()
);

-- One row per instance; `state` is null until it has ended. An id is in one bucket only: its partition's holder sees to that.
create table weft.saga_instance (
  bucket integer not null,
  id uuid not null,
  partition smallint not null,
  saga text not null,
  version text not null,
  started_at timestamptz not null,
  ended_at timestamptz,
  state text,
  -- the business key, if the saga has one
  key text,
  primary key (id, bucket)
) partition by list (bucket);
create index saga_instance_live on weft.saga_instance (partition) where state is null;
create index saga_instance_by_start on weft.saga_instance (saga, started_at);
create index saga_instance_by_key on weft.saga_instance (saga, key, started_at) where key is not null;

-- The log: what happened to an instance, in order. `body` is JSON, kept as text because nothing in here reads it.
create table weft.saga_event (
  bucket integer not null,
  id uuid not null,
  seq integer not null,
  at timestamptz not null,
  body text not null,
  primary key (id, seq, bucket)
) partition by list (bucket);

-- Opens a bucket when the newest is a quarter of `keep` old, drops those whose last instance ended longer than `keep` ago, and
-- returns the newest. Called in a while: until the next call the caller starts instances in the bucket of this one. What another
-- transaction keeps from being done now is done by a later call; null: there is no bucket yet.
create function weft.saga_rotate(keep interval) returns integer
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
  -- whoever waits for this lock makes all others wait behind it
  set lock_timeout = '200ms'
as $$
declare
  newest weft.saga_bucket;
  one record;
  live boolean;
begin
  perform pg_advisory_xact_lock(5701, -1);
  select * into newest from weft.saga_bucket order by bucket desc limit 1;
  for one in select b.bucket from weft.saga_bucket as b order by b.bucket loop
    live := one.bucket = newest.bucket;
    if not live then
      execute format('select exists (select from weft.saga_instance_%1$s where state is null)'
        ' or exists (select from weft.choreography_%1$s join weft.choreography_tracked using (saga) where state is null)',
        one.bucket) into live;
    end if;
    if live then
      update weft.saga_bucket as b set live_at = clock_timestamp() where b.bucket = one.bucket;
    end if;
  end loop;
  if newest.bucket is null or newest.opened_at < clock_timestamp() - keep / 4 then
    begin
      insert into weft.saga_bucket (bucket) values (coalesce(newest.bucket, 0) + 1) returning bucket into one;
      execute format('create table weft.saga_instance_%1$s partition of weft.saga_instance for values in (%1$s);'
        'create table weft.saga_event_%1$s partition of weft.saga_event for values in (%1$s);'
        'create table weft.choreography_%1$s partition of weft.choreography for values in (%1$s)', one.bucket);
    exception when lock_not_available then
      null;
    end;
  end if;
  for one in
    select b.bucket from weft.saga_bucket as b
    where b.bucket < newest.bucket and b.live_at < clock_timestamp() - keep order by b.bucket
  loop
    begin
      execute format('drop table weft.saga_instance_%1$s, weft.saga_event_%1$s, weft.choreography_%1$s', one.bucket);
      delete from weft.saga_bucket as b where b.bucket = one.bucket;
    exception when lock_not_available then
      exit;
    end;
  end loop;
  return (select max(b.bucket) from weft.saga_bucket as b);
end
$$;

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
revoke execute on all functions in schema weft from public;
grant execute on function weft.saga_rotate(interval) to {app};
