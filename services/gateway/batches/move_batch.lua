-- Give a batch another status, if it has one of those that lead there; a repeated call changes nothing.
-- KEYS: batch, its lease, its bitmap of lines, batches that have not ended
-- ARGV: gateway that must hold the lease (empty: anybody may), batch, statuses before (separated by spaces), status,
-- s for which it is kept if it has ended (0: it has not), field, value, ...
-- Returns -1 if the lease is another's, 0 if it has another status, else 1.
if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then return -1 end
local status = redis.call('HGET', KEYS[1], 'status')
if status == ARGV[4] then return 1 end
if not status or not string.find(' ' .. ARGV[3] .. ' ', ' ' .. status .. ' ', 1, true) then return 0 end
redis.call('HSET', KEYS[1], 'status', ARGV[4], unpack(ARGV, 6))
if ARGV[5] ~= '0' then
  redis.call('ZREM', KEYS[4], ARGV[2])
  redis.call('EXPIRE', KEYS[1], ARGV[5])
  redis.call('UNLINK', KEYS[2], KEYS[3])
end
return 1
