with batch as (
    select * from unnest($1::text[], $2::integer[], $3::uuid[]) with ordinality as b (aggregate, n, id, place)
), entered as (
    insert into ledger (aggregate, n, id) select aggregate, n, id from batch
)
insert into weft.outbox (id, aggregate_type, aggregate_id, type, payload)
select id, 'Thing', aggregate, 'ThingChanged', jsonb_build_object('aggregate', aggregate, 'n', n) from batch order by place
