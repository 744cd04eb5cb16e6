-- A service's database: outbox, inbox, and the barrier that makes saga steps take effect once.
--
-- Everything belongs to the superuser, so that a migration cannot break it by accident. Functions that write where the
-- app may not are `security definer` with a pinned search_path and no dynamic SQL.

-- ------------------------------------------------------------------------------------------------ transactional outbox
create table weft.outbox (
    -- of the event. Only indexed by a service that wants that: it costs each insert a page somewhere in an index
    id             text not null default gen_random_uuid()::text,
    aggregate_type text not null,
    aggregate_id   text not null,
    type           text not null,
    -- a payload of JSON, or in `body` the bytes of any other one
    payload        jsonb,
    body           bytea,
    -- media type of the payload; null: application/json, and application/octet-stream of a body
    content_type   text,
    headers        jsonb not null default '{}',
    created_at     timestamptz not null default now(),
    -- what the transaction handles: {"correlationid", "causationid", "traceparent"}, as `weft.receive` or `weft.enter` has set
    -- it. Attributes of the event, unless the headers give others. Null: it handles neither an event nor a command
    context        jsonb default nullif(current_setting('weft.context', true), '')::jsonb,
    -- order within a transaction, and the transaction: what a relay goes by, so the app may not set them
    seq            bigint generated always as identity primary key,
    txid           xid8 not null default pg_current_xact_id(),
    constraint outbox_payload_or_body check ((payload is null) <> (body is null))
);
create index outbox_txid_seq on weft.outbox (txid, seq);

grant insert (id, aggregate_type, aggregate_id, type, payload, body, content_type, headers, created_at) on weft.outbox
    to {app}, {owner};
-- for `insert … returning`, which ORMs like to say
grant select on weft.outbox to {app}, {owner};
-- update: only so that the relay may skip rows that somebody has locked (`for update skip locked`)
grant select, delete, update (seq) on weft.outbox to {relay};

create publication weft_outbox for table weft.outbox with (publish = 'insert');

-- What is published. Belongs to the outbox and not to a relay: one that replaces another goes on where that one ended.
create table weft.relay_ledger (
    one        boolean primary key default true check (one),
    -- the OutboxRelay that has published last, and how many events since it is the one
    relay      text not null,
    published  bigint not null default 0,
    -- the server that positions and transaction ids are of (pg_control_system), and its timeline
    system     text not null,
    timeline   bigint not null,
    -- every transaction that committed before it is published or held. Null: no slot belongs to it
    lsn        pg_lsn,
    -- every row that it sees is published or held. Null: none
    snapshot   pg_snapshot,
    -- no later event may have a lower position than this one
    floor      pg_lsn not null default '0/0',
    updated_at timestamptz not null default now()
);

-- Events that the broker refuses, and events that wait behind one of their aggregate.
create table weft.relay_held (
    -- order in which they are to be published
    place    bigint generated always as identity primary key,
    seq      bigint not null unique,
    -- hash of the aggregate's type and id
    key      bigint not null,
    txid     xid8 not null,
    lsn      pg_lsn not null,
    index    bigint not null,
    attempts integer not null default 0,
    held_at  timestamptz not null default now(),
    -- of the first one of its key: why it was refused, and when it is tried again
    cause    text,
    retry_at timestamptz
);
create index relay_held_key on weft.relay_held (key, place);
create index relay_held_retry on weft.relay_held (retry_at) where retry_at is not null;

-- Dead letters: events that the broker has refused as often as `spec.deadLetter.maxAttempts` says, or that a person skipped.
-- They stay until a person retries or purges them.
create table weft.relay_dead (
    like weft.outbox,
    attempts integer not null,
    cause    text not null,
    died_at  timestamptz not null,
    primary key (seq)
);
create index relay_dead_died on weft.relay_dead (died_at, seq);
grant select, insert, delete on weft.relay_dead to {relay};
-- a dead letter that is retried is a new row
grant insert (id, aggregate_type, aggregate_id, type, payload, body, content_type, headers, created_at, context)
    on weft.outbox to {relay};

-- Published events, for as long as `spec.retention.after` of the OutboxRelay says. Eight tables take turns; the relay writes to the one
-- whose turn it is, and empties the oldest as a whole.
create table weft.relay_published (
    like weft.outbox,
    published_at timestamptz not null,
    turn         smallint not null
) partition by list (turn);
create table weft.relay_published_0 partition of weft.relay_published for values in (0);
create table weft.relay_published_1 partition of weft.relay_published for values in (1);
create table weft.relay_published_2 partition of weft.relay_published for values in (2);
create table weft.relay_published_3 partition of weft.relay_published for values in (3);
create table weft.relay_published_4 partition of weft.relay_published for values in (4);
create table weft.relay_published_5 partition of weft.relay_published for values in (5);
create table weft.relay_published_6 partition of weft.relay_published for values in (6);
create table weft.relay_published_7 partition of weft.relay_published for values in (7);
create table weft.relay_turn (
    one   boolean primary key default true check (one),
    turn  smallint not null default 0,
    since timestamptz not null default now()
);
insert into weft.relay_turn default values;
grant select, insert on weft.relay_published to {relay};
grant truncate on weft.relay_published_0, weft.relay_published_1, weft.relay_published_2, weft.relay_published_3,
    weft.relay_published_4, weft.relay_published_5, weft.relay_published_6, weft.relay_published_7 to {relay};
grant select, update on weft.relay_turn to {relay};

grant usage on schema weft to {relay};
grant select, insert, update on weft.relay_ledger to {relay};
grant select, insert, update, delete on weft.relay_held to {relay};
grant usage on sequence weft.relay_held_place_seq to {relay};

-- Whether a relay sleeps and wants to be woken by a notification. A commit that notifies holds a lock of the whole
-- server from before its record is written until after it is flushed (PreCommit_Notify), so that two of them never share
-- a flush: with 32 writers a quarter of the throughput or less. So only a polling relay that has nothing to do asks for it.
create table weft.relay_wake (
    one    boolean primary key default true check (one),
    asleep boolean not null default false
);
insert into weft.relay_wake default values;
grant select, update on weft.relay_wake to {relay};

-- A transaction that notified cannot be prepared. Where transactions can be, none notifies, and the relay asks more often.
create function weft.wake_relay() returns trigger
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    if (select w.asleep from weft.relay_wake as w) and current_setting('max_prepared_transactions') = '0' then
        perform pg_notify('weft_outbox', '');
    end if;
    return null;
end
$$;

create trigger wake_relay after insert on weft.outbox for each statement execute function weft.wake_relay();

-- ------------------------------------------------------------------------------------- an outbox table of the team's own
-- Of such a table a trigger copies each new row to weft.outbox, so that everything else is as if the service had written
-- there. `weft database setup` makes the trigger and its function, which belong to the table's columns, from the contract.
-- Both execute as whoever inserts: a team can make casts of its own types, which must not run as the superuser.

-- The headers in a text. Headers that are no JSON object are none: the service's insert must not fail for them.
create function weft.outbox_headers(headers text) returns jsonb
    language plpgsql
    immutable
    set search_path = pg_catalog, pg_temp
as $$
declare
    parsed jsonb;
begin
    parsed := headers::jsonb;
    return case jsonb_typeof(parsed) when 'object' then parsed else '{}' end;
exception when data_exception or program_limit_exceeded then
    return '{}';
end
$$;

-- The media type of a payload in a column of text.
create function weft.outbox_content_type(payload text) returns text
    language plpgsql
    immutable
    set search_path = pg_catalog, pg_temp
as $$
begin
    perform payload::json;
    return case when payload is not null then 'application/json' end;
exception when data_exception or program_limit_exceeded then
    return 'text/plain';
end
$$;

-- What Eventuate's own publisher does with a row that it has published.
create function weft.mark_published() returns trigger
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
begin
    new.published := 1;
    return new;
end
$$;

-- --------------------------------------------------------------------------------------------------- duplicate window
-- How long repeated messages (weft.inbox) and commands (weft.saga_barrier) are recognized, as the last set-up was told.
create table weft.duplicate_window (
    part         text primary key check (part in ('messages', 'commands')),
    keep         interval not null,
    -- everything that is older is deleted: a purge begins here, and not with the index entries that others left
    purged_until timestamptz not null default '-infinity'
);
insert into weft.duplicate_window (part, keep) values ('messages', '14 days'), ('commands', '90 days');

-- Deletes some of what is older than the window, in the transaction of a handler: each hundredth call deletes up to 256 rows,
-- which is more than those hundred have inserted. Does nothing while another transaction does it. Deleting, because a
-- partition can only be dropped by a lock that all handlers would wait for.
create function weft.purge(part text) returns void
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    own weft.duplicate_window;
    until timestamptz;
begin
    -- a handler that sees a snapshot may not change what others have changed since
    if random() >= 0.01 or current_setting('transaction_isolation') <> 'read committed' then
        return;
    end if;
    select * into own from weft.duplicate_window as w where w.part = purge.part for update skip locked;
    if not found then
        return;
    end if;
    if purge.part = 'messages' then
        with old as (
            select i.consumer, i.message_id, i.received_at from weft.inbox as i
            where i.received_at >= own.purged_until and i.received_at < now() - own.keep
            order by i.received_at limit 256
        ), gone as (
            delete from weft.inbox as i using old where (i.consumer, i.message_id) = (old.consumer, old.message_id)
        )
        select max(old.received_at) into until from old;
    else
        with old as (
            select b.saga_id, b.step, b.op, b.entered_at from weft.saga_barrier as b
            where b.entered_at >= own.purged_until and b.entered_at < now() - own.keep
            order by b.entered_at limit 256
        ), gone as (
            delete from weft.saga_barrier as b using old
            where (b.saga_id, b.step, b.op) = (old.saga_id, old.step, old.op)
        )
        select max(old.entered_at) into until from old;
    end if;
    update weft.duplicate_window as w set purged_until = until where w.part = purge.part and until is not null;
end
$$;

-- ------------------------------------------------------------------------------------------------------------ context
-- What the transaction handles, for the events that it writes: a setting that ends with the transaction.
create function weft.set_context(correlationid text, causationid text, traceparent text) returns void
    language sql
    set search_path = pg_catalog, pg_temp
as $$
    select set_config('weft.context', jsonb_strip_nulls(jsonb_build_object(
        'correlationid', nullif(correlationid, ''),
        'causationid', causationid,
        'traceparent', nullif(traceparent, '')))::text, true)
$$;

-- ------------------------------------------------------------------------------------------------- idempotent consumer
create table weft.inbox (
    consumer    text not null,
    message_id  text not null,
    received_at timestamptz not null default now(),
    primary key (consumer, message_id)
);
create index inbox_received_at on weft.inbox (received_at);

-- Called by a handler in its own transaction, with the attributes of a CloudEvent. False: this consumer has had the event
-- already, do nothing. While another transaction handles the same event, it waits for that one to end.
--
-- Events that the transaction writes from here on have the same correlationid (the id of an event that has none), are caused
-- by this one (causationid SOURCE/ID), and belong to its trace.
create function weft.receive(
    consumer text, source text, id text, correlationid text default null, traceparent text default null
) returns boolean
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    -- a source is a URI reference: it has no blank
    insert into weft.inbox (consumer, message_id) values (receive.consumer, receive.source || ' ' || receive.id)
    on conflict do nothing;
    if not found then
        return false;
    end if;
    perform weft.set_context(coalesce(nullif(receive.correlationid, ''), receive.id),
        receive.source || '/' || receive.id, receive.traceparent);
    perform weft.purge('messages');
    return true;
end
$$;

-- --------------------------------------------------------------------------------------------------- events of others
-- Written by `weft inbox`, as the app. How far each subscription is in its stream: everything before `next` is handled or held.
create table weft.inbox_position (
    subscription   text primary key,
    stream         text not null,
    -- when the stream was made: one that is made again counts from 1 again
    stream_created text not null,
    next           bigint not null,
    -- what is handled or held behind it
    settled        bigint[] not null default '{}',
    consumed       bigint not null default 0,
    updated_at     timestamptz not null default now()
);

-- Events that the service does not handle, those that wait behind one of their aggregate, and dead letters.
create table weft.inbox_held (
    -- order in which they are to be delivered
    place          bigint generated always as identity primary key,
    subscription   text not null,
    -- hash of what the events are in order by
    key            bigint not null,
    stream_created text not null,
    sequence       bigint not null,
    -- {"attributes", "contentType"} of the CloudEvent; of a message that is none whatever it has
    event          jsonb not null,
    data           bytea not null,
    stored_at      timestamptz not null,
    attempts       integer not null default 0,
    held_at        timestamptz not null default now(),
    -- of the first one of its key: when it is delivered again
    retry_at       timestamptz,
    -- why it was not handled
    cause          text,
    -- of a dead letter
    died_at        timestamptz,
    unique (subscription, stream_created, sequence)
);
create index inbox_held_key on weft.inbox_held (subscription, key, place) where died_at is null;
create index inbox_held_retry on weft.inbox_held (subscription, retry_at) where died_at is null and retry_at is not null;
create index inbox_held_died on weft.inbox_held (subscription, died_at) where died_at is not null;
grant select, insert, update, delete on weft.inbox_position, weft.inbox_held to {app};

-- -------------------------------------------------------------------------------------------------------- saga barrier
create table weft.saga_barrier (
    saga_id    text not null,
    step       text not null,
    op         text not null check (op in ('do', 'undo')),
    -- of a do: done, refused, or undone (its undo came first); of an undo: done, or nothing (there was nothing to undo)
    result     text not null check (result in ('done', 'refused', 'undone', 'nothing')),
    -- for a repetition: the reply of what was done; {"code", "detail"} of what was refused or undone
    reply      jsonb,
    entered_by xid8 not null default pg_current_xact_id(),
    entered_at timestamptz not null default now(),
    primary key (saga_id, step, op)
);
create index saga_barrier_entered_at on weft.saga_barrier (entered_at);

-- Called by a command's handler in its own transaction, with the parts of the header `Idempotency-Key: SAGA/STEP/OP`.
-- Answers what the handler has to do; it commits in every case, since the answer may have left a row that keeps a late do
-- out. Events that the transaction writes from here on have the saga's id as correlationid and the header as causationid.
--
--   do it           do (or undo) it now
--   done before     answer with `reply`, which `weft.remember` kept
--   nothing to do   an undo of what was never done, or was refused: answer that it is undone
--   refused before  answer with the refusal in `reply`, {"code", "detail"}: `weft.refuse` kept it, or the do comes after its
--                   undo (code AlreadyUndone)
--
-- OP is do, undo, or redo: a do that a person asked for again after it was refused; the refusal no longer counts.
--
-- The barrier of DTM (https://en.dtm.pub/practice/barrier.html): an undo first inserts the row of its do. If it can, the do
-- never happened, and from then on it can't. The unique index makes an undo wait for a do whose transaction is still open,
-- and the other way round.
create function weft.enter(
    saga_id text, step text, op text, traceparent text default null, out outcome text, out reply jsonb
)
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    of_do text;
begin
    perform weft.set_context(enter.saga_id, concat_ws('/', enter.saga_id, enter.step, enter.op), enter.traceparent);
    if enter.op = 'undo' then
        insert into weft.saga_barrier (saga_id, step, op, result, reply)
        values (enter.saga_id, enter.step, 'do', 'undone',
            '{"code": "AlreadyUndone", "detail": "this command was undone before it came"}')
        on conflict do nothing;
        select b.result into of_do from weft.saga_barrier as b
        where (b.saga_id, b.step, b.op) = (enter.saga_id, enter.step, 'do');
        insert into weft.saga_barrier (saga_id, step, op, result)
        values (enter.saga_id, enter.step, 'undo', case of_do when 'done' then 'done' else 'nothing' end)
        on conflict do nothing;
        if found then
            outcome := case of_do when 'done' then 'do it' else 'nothing to do' end;
            return;
        end if;
    elsif enter.op in ('do', 'redo') then
        insert into weft.saga_barrier as b (saga_id, step, op, result)
        values (enter.saga_id, enter.step, 'do', 'done')
        on conflict on constraint saga_barrier_pkey do update
            set result = 'done', reply = null, entered_by = default, entered_at = default
            where b.result = 'refused' and enter.op = 'redo';
        if found then
            outcome := 'do it';
            perform weft.purge('commands');
            return;
        end if;
    else
        raise exception 'weft.enter: the operation is `%`, and not do, undo or redo', enter.op
            using errcode = 'invalid_parameter_value';
    end if;
    select
        case b.result when 'done' then 'done before' when 'nothing' then 'nothing to do' else 'refused before' end,
        b.reply
    into outcome, reply
    from weft.saga_barrier as b
    where (b.saga_id, b.step, b.op) = (enter.saga_id, enter.step, case enter.op when 'undo' then 'undo' else 'do' end);
end
$$;

-- Keeps the reply of an operation that was entered in the same transaction, for its repetitions.
create function weft.remember(saga_id text, step text, op text, reply jsonb) returns void
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    update weft.saga_barrier as b set reply = remember.reply
    where (b.saga_id, b.step, b.op) =
            (remember.saga_id, remember.step, case remember.op when 'redo' then 'do' else remember.op end)
        and b.entered_by = pg_current_xact_id() and b.result in ('done', 'nothing');
    if not found then
        raise exception 'weft.remember: this transaction has not entered step % (%) of saga %: call it after weft.enter has answered `do it`',
            remember.step, remember.op, remember.saga_id
            using errcode = 'object_not_in_prerequisite_state';
    end if;
end
$$;

-- Refuses a do for good: it did not happen, will not, and is nothing to undo. Called in the transaction that entered it, as
-- long as that has changed nothing else, or in one of its own after that one was rolled back. Commit, and answer with
-- what it returns, since another copy of the same command may have been first: usually `refused before` with {"code", "detail"}.
create function weft.refuse(saga_id text, step text, code text, detail text, out outcome text, out reply jsonb)
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    insert into weft.saga_barrier as b (saga_id, step, op, result, reply)
    values (refuse.saga_id, refuse.step, 'do', 'refused',
        jsonb_build_object('code', refuse.code, 'detail', refuse.detail))
    on conflict on constraint saga_barrier_pkey do update
        set result = excluded.result, reply = excluded.reply
        where b.entered_by = pg_current_xact_id() and b.result = 'done';
    select case b.result when 'done' then 'done before' else 'refused before' end, b.reply into outcome, reply
    from weft.saga_barrier as b
    where (b.saga_id, b.step, b.op) = (refuse.saga_id, refuse.step, 'do');
end
$$;

revoke execute on all functions in schema weft from public;
grant execute on function
    weft.receive(text, text, text, text, text),
    weft.enter(text, text, text, text),
    weft.remember(text, text, text, jsonb),
    weft.refuse(text, text, text, text)
to {app};
grant execute on function weft.outbox_headers(text), weft.outbox_content_type(text) to {app}, {owner};
-- A trigger's function is checked for EXECUTE when the trigger is made, not when it fires.
