-- Money is in cents.
create table customers (
    id              text primary key default gen_random_uuid()::text,
    name            text not null,
    credit_limit    bigint not null check (credit_limit >= 0),
    reserved        bigint not null default 0 check (reserved between 0 and credit_limit),
    approved_orders bigint not null default 0
);
