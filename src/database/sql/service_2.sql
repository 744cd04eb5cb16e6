-- A service's database, version 2: rows of the outbox notify a relay only while it polls.
--
-- A commit that notifies holds a lock of the whole server from before its record is written until after it is flushed
-- (PreCommit_Notify), so that two of them never share a flush: with 32 writers a quarter of the throughput or less. A
-- relay that tails the log needs no notification.

-- One row. True unless the relay has said otherwise, as a relay of an older version says nothing.
create table weft.relay_wake (
    one     boolean primary key default true check (one),
    polling boolean not null default true
);
insert into weft.relay_wake default values;
grant select, update on weft.relay_wake to {relay};

-- Stale, the flag costs time only: a relay that polls also queries the table by itself, every few seconds.
create or replace function weft.wake_relay() returns trigger
    language plpgsql
    security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    if (select w.polling from weft.relay_wake as w) then
        perform pg_notify('weft_outbox', '');
    end if;
    return null;
end
$$;
