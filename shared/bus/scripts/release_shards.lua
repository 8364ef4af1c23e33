-- Give up shards. The epoch stays, so that the next owner's is higher.
-- KEYS: shards
-- ARGV: replica, shard...
for i = 2, #ARGV do
  local epoch, owner = string.match(redis.call('HGET', KEYS[1], ARGV[i]) or '0 ', '^(%d+) (.*)$')
  if owner == ARGV[1] then redis.call('HSET', KEYS[1], ARGV[i], epoch .. ' ') end
end
