-- Prelude: the gateways that a record names, but for one.
local function others(record, gateway)
  local names = {}
  for name in string.gmatch(redis.call('HGET', record, 'gateways') or '', '%S+') do
    if name ~= gateway then names[#names + 1] = name end
  end
  return names
end
