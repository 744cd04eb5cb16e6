-- One group commit: all transitions of the last milliseconds, or nothing when another process holds one of the
-- partitions. Returns whether all partitions were held, and the ids of starts whose instance exists already.
with fence as (
  select count(*) = cardinality($1::smallint[]) as ours
  from unnest($1::smallint[], $2::bigint[]) as mine (partition, epoch)
  join weft.saga_partition using (partition, epoch)
), started as (
  insert into weft.saga_instance (bucket, id, partition, saga, version, started_at, key)
  select n.bucket, n.id, n.partition, n.saga, n.version, n.at, n.key
  from unnest($3::uuid[], $4::smallint[], $5::text[], $6::text[], $7::timestamptz[], $18::integer[], $19::boolean[],
    $22::text[]) as n (id, partition, saga, version, at, bucket, keyed, key)
  where (select ours from fence)
    -- an id without a key is new
    and not (n.keyed and exists (select from weft.saga_instance as i where i.id = n.id))
  on conflict do nothing
  returning id
), rejected as (
  select n.id from unnest($3::uuid[]) as n (id) where n.id not in (select id from started)
), ended as (
  update weft.saga_instance as i set state = n.state, ended_at = n.at
  from unnest($8::uuid[], $9::text[], $10::timestamptz[], $20::integer[]) as n (id, state, at, bucket)
  where i.id = n.id and i.bucket = n.bucket and (select ours from fence) and n.id not in (select id from rejected)
), counted as (
  insert into weft.saga_count as c (saga, completed, compensated)
  select n.saga, n.completed, n.compensated
  from unnest($11::text[], $12::bigint[], $13::bigint[]) as n (saga, completed, compensated)
  where (select ours from fence)
  on conflict (saga) do update
    set completed = c.completed + excluded.completed, compensated = c.compensated + excluded.compensated
), logged as (
  insert into weft.saga_event (bucket, id, seq, at, body)
  select n.bucket, n.id, n.seq, n.at, n.body
  from unnest($14::uuid[], $15::integer[], $16::timestamptz[], $17::text[], $21::integer[]) as n (id, seq, at, body, bucket)
  where (select ours from fence) and n.id not in (select id from rejected)
)
select (select ours from fence) as ours, coalesce(array(select id from rejected), '{}') as rejected
