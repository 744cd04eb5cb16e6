-- A service's database: outbox, inbox, and the barrier that makes saga steps take effect once.
--
-- Everything belongs to the superuser, so that a migration cannot break it by accident. Functions that write where the
-- app may not are `security definer` with a pinned search_path and no dynamic SQL.

-- ------------------------------------------------------------------------------------------------ transactional outbox
create table weft.outbox (
    -- of the event. Only indexed by a service that wants that: it costs each insert a page somewhere in an index
    id             uuid not null default gen_random_uuid(),
    aggregate_type text not null,
    aggregate_id   text not null,
    type           text not null,
    payload        jsonb not null,
    headers        jsonb not null default '{}',
    created_at     timestamptz not null default now(),
    -- order within a transaction, and the transaction: what a relay goes by, so the app may not set them
    seq            bigint generated always as identity primary key,
    txid           xid8 not null default pg_current_xact_id()
);
create index outbox_txid_seq on weft.outbox (txid, seq);

grant insert (id, aggregate_type, aggregate_id, type, payload, headers, created_at) on weft.outbox to {app}, {owner};
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

-- ------------------------------------------------------------------------------------------------- idempotent consumer
create table weft.inbox (
    consumer    text not null,
    message_id  text not null,
    received_at timestamptz not null default now(),
    primary key (consumer, message_id)
);

-- Called by a handler in its own transaction. False: this consumer has had the message already, do nothing.
-- While another transaction handles the same message, it waits for that one to end.
create function weft.receive(consumer text, message_id text) returns boolean
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    insert into weft.inbox (consumer, message_id) values (receive.consumer, receive.message_id) on conflict do nothing;
    return found;
end
$$;

-- -------------------------------------------------------------------------------------------------------- saga barrier
create table weft.saga_barrier (
    saga_id    text not null,
    step       text not null,
    op         text not null check (op in ('do', 'undo')),
    -- who inserted the row: the operation itself, or an undo that came before its do
    by_op      text not null check (by_op in ('do', 'undo')),
    reply      jsonb,
    entered_at timestamptz not null default now(),
    primary key (saga_id, step, op)
);

-- Called by a command's handler in its own transaction. True: do it (or undo it) now. False: answer without doing
-- anything, because this operation was entered before, or it is an undo whose do never happened, or a do that comes after
-- its undo. Commit in either case: a `false` may leave the mark that keeps a late do out.
--
-- The barrier of DTM (https://en.dtm.pub/practice/barrier.html): an undo first takes its own key, then its do's. Getting
-- the latter means that the do never happened; from then on it can't. The unique index makes an undo wait for a do whose
-- transaction is still open, and the other way round.
create function weft.enter(saga_id text, step text, op text) returns boolean
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    insert into weft.saga_barrier (saga_id, step, op, by_op)
    values (enter.saga_id, enter.step, enter.op, enter.op)
    on conflict do nothing;
    if not found then
        return false;
    end if;
    if enter.op = 'do' then
        return true;
    end if;
    insert into weft.saga_barrier (saga_id, step, op, by_op)
    values (enter.saga_id, enter.step, 'do', enter.op)
    on conflict do nothing;
    return not found;
end
$$;

-- Keeps the reply of an operation that was entered in the same transaction, for `weft.recall`.
create function weft.remember(saga_id text, step text, op text, reply jsonb) returns void
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    update weft.saga_barrier as b set reply = remember.reply
    where (b.saga_id, b.step, b.op) = (remember.saga_id, remember.step, remember.op);
    if not found then
        raise exception 'weft.remember comes after weft.enter: step % (%) of saga % was never entered',
            remember.step, remember.op, remember.saga_id
            using errcode = 'object_not_in_prerequisite_state';
    end if;
end
$$;

-- The reply that `weft.remember` kept, or null.
create function weft.recall(saga_id text, step text, op text) returns jsonb
    language sql
    stable
    security definer
    set search_path = pg_catalog, pg_temp
as $$
    select b.reply from weft.saga_barrier as b
    where (b.saga_id, b.step, b.op) = (recall.saga_id, recall.step, recall.op)
$$;

revoke execute on all functions in schema weft from public;
grant execute on function
    weft.receive(text, text),
    weft.enter(text, text, text),
    weft.remember(text, text, text, jsonb),
    weft.recall(text, text, text)
to {app};
-- A trigger's function is checked for EXECUTE when the trigger is made, not when it fires.
