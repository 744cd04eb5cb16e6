-- An order may name an article, of which it takes one piece when it is approved.
create table stock (
    article text primary key,
    pieces  integer not null check (pieces >= 0)
);
insert into stock (article, pieces) values ('teapot', 100);

alter table orders add column article text;
