-- One batch of what was seen of choreographed sagas: the rows as they are now, and by how much the counts change.
with written as (
  insert into weft.choreography (bucket, id, saga, version, correlation, started_at, ended_at, state, compensating, stuck_since,
    due_at, events)
  select * from unnest($1::integer[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::timestamptz[], $7::timestamptz[],
    $8::text[], $9::boolean[], $10::timestamptz[], $11::timestamptz[], $12::text[])
  on conflict (id, bucket) do update set
    version = excluded.version, started_at = excluded.started_at, ended_at = excluded.ended_at, state = excluded.state,
    compensating = excluded.compensating, stuck_since = excluded.stuck_since, due_at = excluded.due_at,
    events = excluded.events
), counted as (
  insert into weft.choreography_count as c (saga, completed, compensated)
  select * from unnest($13::text[], $14::bigint[], $15::bigint[])
  on conflict (saga) do update
    set completed = c.completed + excluded.completed, compensated = c.compensated + excluded.compensated
)
insert into weft.choreography_finding as f (saga, finding, service, event, cause_service, cause_event, count)
select * from unnest($16::text[], $17::text[], $18::text[], $19::text[], $20::text[], $21::text[], $22::bigint[])
on conflict (saga, finding, service, event, cause_service, cause_event) do update
  set count = f.count + excluded.count, last_at = clock_timestamp()
