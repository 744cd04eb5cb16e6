-- Money is in cents. A customer lives in another service's database, so there is no foreign key.
create table orders (
    id              text primary key default gen_random_uuid()::text,
    customer_id     text not null,
    total           bigint not null check (total > 0),
    state           text not null default 'PENDING' check (state in ('PENDING', 'APPROVED', 'REJECTED')),
    reason          text,
    idempotency_key text unique,
    created_at      timestamptz not null default now()
);
